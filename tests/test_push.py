"""Push to a simulated Hub over HTTP, with the real client: preview, upload, broken connections, errors and secrets."""

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow
import pytest
from hub_client import hub_commands
from hub_server import QUOTA, READ_TOKEN, TOKEN
from hub_storage import Faults
from pyarrow import parquet
from sampling import one_in

from hub_upload.push import PushArguments

ROOT = Path(__file__).resolve().parent.parent
CARD = "---\nlicense: mit\nlanguage: [pt, en]\n---\n\n# Capivara\n\nA model.\n"


def weights(letter: bytes, size: int) -> bytes:
    """Return a safetensors file of `size` bytes with one tensor of a repeated byte."""
    number = size - 100
    header = json.dumps({"w": {"dtype": "U8", "shape": [number], "data_offsets": [0, number]}}).encode().ljust(92)
    return len(header).to_bytes(8, "little") + header + letter * number


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    with hub_commands(tmp_path_factory.mktemp("push")) as run_push:
        yield run_push


@pytest.fixture
def hub(commands):
    """The simulated Hub, without repositories and faults."""
    commands.hub.faults, commands.hub.page_size, commands.hub.uploaded = Faults(), 1000, 0
    commands.hub.storage.repos.clear()
    for path in (commands.hub.storage.folder / "lfs").iterdir():
        path.unlink()
    commands.hub.requests.clear()
    return commands.hub


@pytest.fixture
def folder(tmp_path):
    """The folder of a model: two files that the Hub stores in LFS, and two small ones."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "README.md").write_text(CARD, encoding="utf-8")
    (folder / "config.json").write_text('{"model_type": "capivara"}', encoding="utf-8")
    (folder / "model.safetensors").write_bytes(weights(b"m", 300_000))
    (folder / "open_clip_model.safetensors").write_bytes(weights(b"o", 100_000))
    return folder


@pytest.fixture
def push(commands, hub, folder):
    """The push command on the folder; `push("--push")` uploads it."""

    def run(*flags, **options):
        return commands("--model", folder, "--repo-id", "us/model", *flags, **options)

    return run


def written(hub) -> list[str]:
    """Return the paths of the requests that change something on the Hub."""
    return [path for method, path in hub.requests if method != "GET" and not path.endswith("validate-yaml")]


# --- Uploaded files --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_push_without_the_flag_shows_changes_and_makes_none(hub, push):
    done = push()
    assert done.code == 0 and not written(hub) and not hub.storage.repos
    for shown in ("us/model (does not exist, will be created)", "add     README.md", "model.safetensors  (300kB)"):
        assert shown in done.out
    assert "license: mit" in done.out and "token of ana" in done.out
    assert "Nothing was sent. With --push, 4 files (400kB)" in done.out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("offline", "token"), [({"HF_HUB_OFFLINE": "1"}, ""), ({"HF_ENDPOINT": "http://127.0.0.1:9"}, TOKEN)]
)
def test_a_preview_needs_no_hub(folder, tmp_path, offline, token):
    """If the Hub can't be reached, a preview lists the files and claims nothing about the Hub. A push fails."""
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": token, "HF_HUB_OFFLINE": "0", **offline}
    words = [sys.executable, "-m", "hub_upload.push", "--model", str(folder), "--repo_id", "us/model"]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (
        "send    README.md" in done.stdout
        and "4 files (400kB)" in done.stdout
        and TOKEN not in done.stdout + done.stderr
    )
    for claim in ("will be created", "pull request", "have already arrived", "no commit", "nobody"):
        assert claim not in done.stdout + done.stderr
    assert ("there is no token" in done.stdout) == (not token)
    pushed = subprocess.run([*words, "--push"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert pushed.returncode == 1 and pushed.stderr.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize("license", ["mit", "[cc-by-nc-4.0, mit]"])
def test_a_handwritten_card_states_no_license_that_the_base_forbids(hub, push, folder, license):
    work = {"title": "facebook/metaclip-2", "licenses": ["cc-by-nc-4.0"]}
    run = {"origins": {"model": work, "datasets": [{"title": "pictures", "licenses": ["cc-by-4.0"]}]}}
    (folder / "run.json").write_text(json.dumps(run), encoding="utf-8")
    (folder / "README.md").write_text(CARD.replace("mit", license), encoding="utf-8")
    for flags in ([], ["--push"]):
        done = push(*flags)
        assert done.code == 1 and re.search(r"\bmit\b.*facebook/metaclip-2.*\bcc-by-nc-4\.0\b", done.err), done.err
    assert not written(hub) and not hub.storage.repos
    (folder / "README.md").write_text(CARD.replace("mit", "cc-by-nc-4.0"), encoding="utf-8")
    assert "license: cc-by-nc-4.0" in push().out
    for damaged in ({"model": "x", "datasets": 1}, {"model": {"licenses": 1}}, [], None):
        (folder / "run.json").write_text(json.dumps({"origins": damaged}), encoding="utf-8")
        assert push().code == 0


def test_create_push_and_push_again(hub, push, folder):
    done = push("--push", "--message", "First")
    assert done.code == 0 and f"{hub.url}/us/model/commit/" in done.out, done.err
    assert hub.files("us/model") == {path.name: path.read_bytes() for path in folder.iterdir()}
    blob = hub.repo("us/model").at("main").files["model.safetensors"]
    assert blob.sha256 == hashlib.sha256(weights(b"m", 300_000)).hexdigest() and hub.uploaded == 400_000
    assert hub.commits("us/model") == ["First"] and not hub.repo("us/model").private
    hub.requests.clear()
    again = push("--push")
    assert again.code == 0 and "nothing to send" in again.out and not written(hub)
    assert hub.commits("us/model") == ["First"]


@pytest.mark.slow
def test_only_changed_files_are_sent_and_files_of_others_stay(hub, push, folder):
    hub.page_size = 2  # the Hub lists files in pages; all of them must be read
    push("--push")
    notes = hub.storage.add(b"of others", lfs=False)
    hub.repo("us/model").commit("main", "theirs", {"notes.txt": notes})
    (folder / "README.md").write_text(CARD.replace("mit", "apache-2.0"), encoding="utf-8")
    (folder / "config.json").unlink()
    hub.uploaded = 0
    done = push("--push")
    assert done.code == 0, done.err
    shown = ("change  README.md", "same    2 files", "stays   config.json", "stays   notes.txt")
    assert all(line in done.out for line in shown) and ".gitattributes" not in done.out
    files = hub.files("us/model")
    assert set(files) == {"README.md", "config.json", "model.safetensors", "open_clip_model.safetensors", "notes.txt"}
    assert b"apache" in files["README.md"] and hub.uploaded == 0
    assert hub.commits("us/model") == ["Update README.md", "theirs", "Add 4 files"]


@pytest.mark.slow
def test_a_branch_is_created_from_main_and_committed_to(hub, push, folder):
    push("--push")
    assert "next, will be created from main" in push("--revision", "next").out
    assert "next" not in hub.repo("us/model").branches
    assert "no commit was made" in push("--revision", "next", "--push").out  # no file differs; only the branch is new
    (folder / "config.json").write_text("{}", encoding="utf-8")
    assert push("--revision", "next", "--push").code == 0
    assert hub.commits("us/model", "next") == ["Update config.json", "Add 4 files"]
    assert hub.commits("us/model") == ["Add 4 files"]
    other = push("--repo-id", "us/other", "--revision", "v2", "--push")  # if a flag is repeated, the last one counts
    assert other.code == 0 and hub.commits("us/other", "v2") == ["Add 4 files"] and not hub.commits("us/other")


@pytest.mark.slow
def test_a_pull_request_with_a_read_token(hub, push, folder):
    assert "us/model" in push("--push", "--pull-request", token=READ_TOKEN).err
    push("--push")
    (folder / "config.json").write_text("{}", encoding="utf-8")
    (folder / "model.safetensors").write_bytes(weights(b"n", 300_000))
    done = push("--push", "--pull-request", token=READ_TOKEN)
    assert done.code == 0 and f"{hub.url}/us/model/discussions/1" in done.out, done.err
    assert hub.files("us/model")["config.json"] != b"{}" == hub.files("us/model", "refs/pr/1")["config.json"]
    hub.faults = Faults(lost_commit_replies=9)
    done = push("--push", "--pull-request")
    assert done.code == 1 and "--pull_request" in done.err
    assert len(hub.repo("us/model").pulls) == 2, "a second pull request was opened"


@pytest.fixture
def space(commands, hub, tmp_path):
    """Push of a Space whose repository holds other files too, some of them in the folders that are uploaded."""
    folder = tmp_path / "space"
    (folder / "index").mkdir(parents=True)
    (folder / "README.md").write_text("---\nsdk: docker\n---\n# Fotos\n", encoding="utf-8")
    (folder / "index" / "new.bin").write_bytes(b"new")
    hub.store("us/demo", folder, "spaces")
    blob = hub.storage.add(b"of before", lfs=False)
    others = ("index/old.bin", "index/a/old.bin", "notes/theirs.txt", "indexes/old.bin", "theirs.txt")
    hub.repo("us/demo", "spaces").commit("main", "theirs", dict.fromkeys(others, blob))
    flags = ("--model", folder, "--repo-id", "us/demo", "--repo-type", "space", "--push")
    return lambda: commands(*flags)


def test_a_push_of_a_space_deletes_only_old_files_in_uploaded_folders(hub, space):
    done = space()
    assert done.code == 0 and "delete  index/old.bin" in done.out, done.err
    expected = {"README.md", "index/new.bin", "notes/theirs.txt", "indexes/old.bin", "theirs.txt"}
    assert {*hub.files("us/demo", kind="spaces")} == expected


def test_a_refused_commit_fails_if_files_to_delete_are_still_on_the_hub(hub, space):
    """Somebody else has committed in the meantime (412), so the files that the push would delete are still there."""
    hub.faults = Faults(concurrent_commit=True)
    done = space()
    assert done.code == 1 and "us/demo" in done.err and "(412)" in done.err
    assert "index/old.bin" in hub.files("us/demo", kind="spaces") and "Pushed" not in done.out


@pytest.mark.slow
def test_a_push_of_a_dataset_sends_rows_and_card_and_refuses_secrets_in_rows(commands, hub, tmp_path):
    data = tmp_path / "data"
    (data / "train").mkdir(parents=True)
    (data / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n# Fotos\n", encoding="utf-8")
    parquet.write_table(pyarrow.table({"caption": ["um gato"]}), data / "train" / "rows.parquet")
    (data / "train" / "build.sh").write_text("rm -r /", encoding="utf-8")
    (data / ".cache").mkdir()
    (data / ".cache" / "x.json").write_text("{}", encoding="utf-8")
    flags = ("--model", data, "--repo-id", "us/data", "--repo-type", "dataset")
    assert commands(*flags, "--push").code == 0
    assert set(hub.files("us/data", kind="datasets")) == {"README.md", "train/rows.parquet"}
    assert "nothing to send" in commands(*flags, "--push").out
    assert ("models", "us/data") not in hub.storage.repos
    hub.requests.clear()
    secret = "github_pat_" + "a1B2c3" * 9
    parquet.write_table(pyarrow.table({"captions": [["um gato"], ["a", f"b {secret}"]]}), data / "more.parquet")
    done = commands(*flags, "--push")
    assert done.code == 1 and "more.parquet, column 'captions', row 1" in done.err
    assert secret not in done.out + done.err and hub.requests == []
    code = "import datasets; print(datasets.load_dataset('us/data')['train'][0]['caption'])"
    read = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **hub.environment(tmp_path / "reader")}, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    assert read.stdout.splitlines()[-1] == "um gato"


# --- Errors ----------------------------------------------------------------------------------------------------------


def test_a_wrong_or_missing_token_is_refused_before_anything_is_sent(hub, push):
    for flags in ((), ("--push",)):
        done = push(*flags, token="hf_" + "w" * 34)
        assert done.code == 1 and "error: " in done.err and "(401)" in done.err
    assert "HF_TOKEN" in push(token=None).out
    done = push("--push", token=None)
    assert done.code == 1 and "HF_TOKEN" in done.err and not written(hub)


@pytest.mark.parametrize("exists", [False, True])
def test_a_token_without_write_access_is_refused_in_one_line(hub, push, folder, exists):
    if exists:
        push("--push")
        (folder / "config.json").write_text("{}", encoding="utf-8")
    done = push("--push", token=READ_TOKEN)
    assert done.code == 1 and "(403)" in done.err
    assert "member of us" in done.err and done.err.strip().count("\n") == 0


@pytest.mark.slow
def test_an_interrupted_upload_continues_with_the_missing_files(hub, push, folder):
    hub.faults = Faults(fail_upload_after_bytes=200_000)  # the smaller file arrives, the larger one never
    done = push("--push")
    assert done.code == 1 and "error: " in done.err and "Run the same command again" in done.err
    assert 5 <= len(done.waits_s) <= 10 and sum(done.waits_s) < 60  # retries must end
    assert not hub.commits("us/model") and hub.storage.lfs_bytes() == 100_000
    hub.faults, hub.uploaded = Faults(), 0
    assert push("--push").code == 0
    assert hub.uploaded == 300_000  # and not a byte of the smaller one
    assert hub.files("us/model") == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert hub.commits("us/model") == ["Add 4 files"]


@pytest.mark.slow
def test_a_dead_connection_is_noticed_after_the_timeout(hub, folder, tmp_path):
    hub.faults = Faults(silent_uploads=1)
    code = "import time; time.sleep = lambda s: None; import hub_upload.push as push; push.HUB_TIMEOUT_S = 2\n"
    code += "push.main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "--model", str(folder), "--repo-id", "us/model", "--push"],
        cwd=ROOT, env={**os.environ, **hub.environment(tmp_path / "home")}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and "timed out' thrown while requesting PUT" in done.stderr, done.stderr
    assert hub.commits("us/model") == ["Add 4 files"]


@pytest.mark.slow
@pytest.mark.parametrize("faults", [{"lost_commit_replies": 1}, {"commit_statuses": [503], "late_commit": True}])
def test_a_commit_with_a_lost_or_late_answer_is_not_made_twice(hub, push, faults):
    hub.faults = Faults(**faults)
    done = push("--push")
    assert done.code == 0 and f"Pushed in one commit: {hub.url}/us/model/commit/" in done.out, done.err
    assert hub.commits("us/model") == ["Add 4 files"]
    assert hub.repo("us/model").branches["main"] in done.out


@pytest.mark.slow
def test_server_errors_are_retried_a_limited_number_of_times(hub, push):
    hub.faults = Faults(commit_statuses=[503])
    assert push("--push").code == 0
    hub.storage.repos.clear()
    hub.faults = Faults(commit_statuses=[500] * 99)
    done = push("--push")
    assert done.code == 1 and "(500)" in done.err and "Run the same command again" in done.err
    assert sum(done.waits_s) < 60


@pytest.mark.parametrize("status", [403, 507])
def test_a_full_quota_is_reported_in_the_words_of_the_hub(hub, push, status):
    hub.faults = Faults(quota_bytes=350_000, quota_status=status)
    done = push("--push")
    assert done.code == 1 and f"({status}): {QUOTA.rstrip('.')}" in done.err
    assert hub.uploaded == 0 and not hub.commits("us/model")
    hub.faults = Faults()
    assert push("--push").code == 0


@pytest.mark.slow
def test_a_push_fails_if_somebody_else_commits_in_the_meantime(hub, push, folder):
    push("--push")
    (folder / "config.json").write_text("{}", encoding="utf-8")
    hub.faults = Faults(concurrent_commit=True)
    done = push("--push")
    assert done.code == 1 and "us/model" in done.err and "(412)" in done.err
    assert hub.commits("us/model")[0] == "A line of \x1b[31mtheirs"
    done = push("--push")  # the message says to run it again
    assert done.code == 0 and "stays   theirs.txt" in done.out and hub.files("us/model")["config.json"] == b"{}"


def test_a_card_with_invalid_front_matter_is_refused_before_the_upload(hub, push, folder):
    (folder / "README.md").write_text("---\nlicense: [mit\n---\n", encoding="utf-8")
    done = push("--push")
    assert done.code == 1 and "README.md" in done.err and "YAML" in done.err and not written(hub)


JSON = {"Content-Type": "application/json"}
FORM = "HF_ENDPOINT"  # the message for an answer that is not from the Hub tells to check HF_ENDPOINT
ANSWERS = {
    ("whoami", FORM): (200, {"Content-Type": "text/html"}, b"<html>Sign in</html>"),
    ("info", r"\(404\)"): (302, {"Location": "/login"}, b""),
    ("tree", FORM): (200, JSON, b"\xff\xfe{"),
    ("preupload", FORM): (200, JSON, b"[" * 100_000),
    ("commit", FORM): (200, JSON, b'{"sha": "ab'),
}


@pytest.mark.parametrize(("call", "message"), one_in(2, [*ANSWERS]))
def test_an_answer_that_is_not_from_the_hub_is_an_error_in_one_line(hub, push, call, message):
    """For example the page of a proxy. It must not be taken for success."""
    hub.faults = Faults(answers={call: ANSWERS[call, message]})
    done = push("--push")
    lines = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert done.code == 1 and len(lines) == 1 and done.err.rstrip().endswith(lines[0]), done.err
    assert "Traceback" not in done.err and re.search(message, lines[0]), lines
    assert not hub.storage.repos or not hub.commits("us/model")


# --- Secrets and terminals -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_texts_from_the_hub_are_shown_without_token_and_control_characters(hub, push, folder):
    hub.faults = Faults(commit_statuses=[400], commit_message=f"no {TOKEN} \x1b[2J")
    hub.faults.commit_message = hub.faults.commit_message.encode().decode("latin-1")
    done = push("--push")
    assert done.code == 1 and "no hf_***" in done.err and "\x1b[2J" not in done.err
    push("--push")
    hostile = hub.storage.add("---\nlicense: mit\n---\n\x1b]0;owned\x07\u202eevil\n".encode(), lfs=False)
    hub.repo("us/model").commit("main", "theirs", {"README.md": hostile, "a\x1b[31m\nb.txt": hostile})
    done = push()
    assert r"a\x1b[31m\nb.txt" in done.out
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202e]", done.out)


def test_a_token_in_a_file_or_flag_is_neither_sent_nor_shown(hub, push, folder):
    for flags in (("--token", TOKEN), (f"--token={TOKEN}",), ("--repo-type", TOKEN), ("--repo-id", TOKEN)):
        done = push(*flags)  # `commands` checks that no output holds the token
        assert done.code in (1, 2) and "error: " in done.err
    (folder / "config.json").write_text(json.dumps({"note": TOKEN}), encoding="utf-8")
    done = push("--push")
    assert done.code == 1 and "config.json, line 1" in done.err and not written(hub)
    (folder / "config.json").write_text(json.dumps({"dataset": str(folder)}), encoding="utf-8")
    done = push("--push")
    assert done.code == 1 and "config.json, line 1" in done.err and "hub_upload.export" in done.err


@pytest.mark.parametrize(("flag", "secret"), [("--message", "ghp_" + "a1B2" * 9), ("--revision", "AKIA" + "ABCD" * 4)])
def test_a_secret_or_path_in_a_commit_title_or_branch_is_refused(hub, push, flag, secret):
    done = push("--push", flag, secret)
    assert done.code == 2 and f"{flag} " in done.err
    assert secret not in done.out + done.err and hub.requests == []
    done = push("--push", "--message", "Of /data1/maria/runs")
    assert done.code == 2 and "--message" in done.err and hub.requests == []


@pytest.mark.parametrize("name", ["README.md", "curves.png"])
def test_a_file_that_is_not_regular_is_refused_at_once(hub, push, folder, name):
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)  # reading it would block forever
    done = push("--push")
    assert done.code == 1 and name in done.err and not written(hub)


# --- Flags -----------------------------------------------------------------------------------------------------------

BAD_ARGUMENTS = {
    "id without owner": ({"repo_id": "model"}, "owner/name.*'model'"),
    "id with invalid characters": ({"repo_id": "a/b?c"}, r"a/b\?c"),
    "missing folder": ({"model": Path("/nowhere/model")}, "/nowhere/model"),
    "branch of a pull request": ({"revision": "next", "pull_request": True}, "--revision next"),
}


@pytest.mark.parametrize("fault", BAD_ARGUMENTS)
def test_wrong_arguments_are_refused(tmp_path, fault):
    overrides, message = BAD_ARGUMENTS[fault]
    with pytest.raises(ValueError, match=message):
        PushArguments(**{"model": tmp_path, "repo_id": "us/model", **overrides})


def test_a_private_push_to_a_public_repository_is_refused(hub, push):
    hub.storage.create("models", "us/model", private=False)
    done = push("--push", "--private")
    assert done.code == 1 and "us/model" in done.err and "--private" in done.err and not written(hub)
