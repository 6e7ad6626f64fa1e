"""Detection of secrets and absolute paths: what is found and hidden, and what is left alone."""

import re
import time
from pathlib import Path

import pytest
import yaml

from capivara_common.privacy import (
    SECRET_RE2,
    find_machine_path,
    find_secret,
    hide_paths,
    local_paths,
    make_printable,
    redact,
    short_name,
)

ROOT = Path(__file__).resolve().parent.parent
LETTERS = "a1B2c3D4e5F6g7H8i9J0k1L2m3N4o5P6q7R8s9T0"
SECRETS = {
    "hf": "hf_" + LETTERS[:34],
    "hf oauth": "hf_oauth_" + LETTERS[:30] + ".x-y_z",
    "hf organization": "api_org_" + LETTERS[:34],
    **{f"gh{kind}": f"gh{kind}_" + LETTERS[:36] for kind in "pousr"},
    "github_pat": "github_pat_11" + LETTERS[:20] + "_" + LETTERS,
    "AWS key": "AKIA" + "ABCDEFGH12345678",
    "AWS temporary key": "ASIA" + "ABCDEFGH12345678",
    "AWS secret": "aws_secret_access_key = " + LETTERS,
    "AWS secret, other name": "aws_secret_key=" + LETTERS,
    "AWS secret, without AWS": "secret_access_key: " + LETTERS,
    "AWS secret, as JSON": 'SecretAccessKey": "' + LETTERS,
    "AWS secret, as JSON in JSON": 'SecretAccessKey\\": \\"' + LETTERS,
    "Google": "AIza" + LETTERS[:35],
    "Google client": "GOCSPX-" + LETTERS[:28],
    "RSA": "-----BEGIN RSA PRIVATE KEY-----",
    "OpenSSH": "-----BEGIN OPENSSH PRIVATE KEY-----",
    "PKCS 8": "-----BEGIN PRIVATE KEY-----",
    "PGP": "-----BEGIN PGP PRIVATE KEY BLOCK-----",
}
ESCAPES = (r"key:\n{}", r"a\t{}", r"a\r\n{}", r"said \u201c{}\u201d", r"\u00E7{}", "token%3D{}", "token%3d{}")
NO_SECRETS = (
    "hf_hub_download of hf_modules", "ghp_", "github_pat_", "AKIA is a name", "https://hf.co/hf_x", "wolf_" + LETTERS,
    "sha256 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08", "-----BEGIN PUBLIC KEY-----",
    "HALFAKIAABCDEFGH12345678", "a capivara hf_ e o gato ghi", "Basic usage of basic Portuguese", "design=3",
    r"hf\u005fhub_download", "see https://host/x?a=1", "ring bearer 2024", "basic iPhone", "bearer of news",
    "the sig: none", "basic JavaScript", "https://h:9000/x", "https://h/a@b", "max_token=5", "bearer: nobody",
)  # fmt: skip


@pytest.mark.parametrize("kind", SECRETS)
@pytest.mark.parametrize(
    "around", ["{}", "the key '{}' is mine", '{{"a": "{}"}}', "TOKEN_{}\nand more", "x={}&y", *ESCAPES]
)
def test_every_kind_of_secret_is_found_in_any_context(kind, around):
    import pyarrow.compute

    text = around.format(SECRETS[kind])
    description, position = find_secret(text)
    prefix = re.search(r"\((.+)…\)", description)[1]
    assert SECRETS[kind].startswith(prefix) and len(prefix) <= 21 and text[position:].startswith(SECRETS[kind])
    assert find_secret(text.encode()) == (description, position)
    assert pyarrow.compute.match_substring_regex(pyarrow.array([text]), SECRET_RE2).to_pylist() == [True]
    assert SECRETS[kind] not in redact(text) and "***" in redact(text)


@pytest.mark.parametrize("sign", [r"\u005f", r"\u005F", "%5f"])
@pytest.mark.parametrize("kind", ["hf", "hf oauth", "hf organization", "ghp", "github_pat", "AWS secret, without AWS"])
def test_a_secret_with_an_escaped_underscore_is_found(kind, sign):
    import pyarrow.compute

    for text in (SECRETS[kind].replace("_", sign), f'{{"a": "{SECRETS[kind].replace("_", sign, 1)}"}}'):
        assert find_secret(text) == find_secret(text.encode()) and find_secret("x" * 1000 + " " + text)
        assert 0 <= find_secret(text)[1] < text.index(sign)
        assert pyarrow.compute.match_substring_regex(pyarrow.array([text]), SECRET_RE2).to_pylist() == [True]
        assert LETTERS[:15] not in redact(text) and "***" in redact(text)


SECRET = "a1B2c3D4"
REQUEST_FORMS = (
    "Authorization: Bearer {}", "authorization: bearer {}", "BEARER {}", "Authorization: Basic {}=", "basic {}",
    '"authorization": "Basic {}"', "https://h/x?sig={}&b=1", "?sv=1&SIG={}", "sig={}", "X-Amz-Signature={}",
    "x-amz-signature={}", '"x-amz-security-token": "{}"', "x-amz-credential%3d{}", "secret_access_key: {}",
    "AWS_SECRET_ACCESS_KEY={}", "s3://KEY:{}@bucket/fotos", "https://ana:{}@host:9000/x", "x-goog-signature={}",
    "s3://KEY:ab/{}@bucket/fotos", "s3://KEY:{}/x?y#z@bucket", 'sig="{}"', "sig='{}'", "Bearer%20{}", "Basic%20{}",
    "bearer:{}", "https://h/x?token={}", "?access_token={}", "secret-access-key={}", "aws_session_token={}",
    "Authorization: AWS4-HMAC-SHA256 Credential={}/x/s3/aws4_request,",
    "AWS4-HMAC-SHA256 Credential={}/20240101/us-east-1/s3/aws4_request,",
)  # fmt: skip


@pytest.mark.parametrize("form", REQUEST_FORMS)
def test_secrets_in_urls_and_headers_are_redacted(form):
    redacted = redact(f"It failed: {form.format(SECRET)} and more")
    assert SECRET not in redacted and redacted.startswith("It failed: ") and redacted.endswith(" and more")


@pytest.mark.parametrize("text", NO_SECRETS)
def test_text_without_secrets_is_unchanged(text):
    import pyarrow.compute

    assert find_secret(text) is find_secret(text.encode()) is None and redact(text) == text
    assert pyarrow.compute.match_substring_regex(pyarrow.array([text]), SECRET_RE2).to_pylist() == [False]


def test_the_token_of_this_machine_is_a_secret_in_any_form(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "of-another-form")
    assert find_secret("see of-another-form") == find_secret(b"see of-another-form") == ("a token of this machine", 4)
    assert redact("see of-another-form") == "see hf_***"


PATHS = (
    "/data1/maria/fotos", "/gpfs/home/x", "/srv/runs/mine", "/home/maria/captions", "/a/b", "/1tb/maria/x.json",
    "/Volumes/Disco/fotos", "/lustre/scratch/m/x.parquet", "/nix/store/abc-x", "/été/maria/x", "C:\\Users\\ana\\x",
    "D:\\dados\\fotos", "E:/dados/fotos/1.jpg", "/mnt/c/Users/ana/x/",
    "\\\\nas\\maria\\x", "\\\\nas.local\\ana$\\fotos", "\\\\\\\\nas\\\\maria\\\\x", "//nas/maria/x", "///home/maria/x",
    "//nas.local/maria/x",
    "/path/to/../../home/maria/x", "file://nas/maria/x", "/docs/maria/x", "/datasets/maria/x",
)  # fmt: skip
NO_PATHS = (
    "https://huggingface.co/home/x", "see https://x.org/?next=/home/page", "hf://datasets/a/b/c", "s3://bucket/a/b",
    "a/home/b", "laion/CLIP-ViT-B-32", "pairs/s", "km/h", "/", "//", "and/or", "e/ou", "../tmp/x", "./a/b/c", "~/tmp/x",
    "1/2", "12/05/2020", "em 1/2/3", "image/png", "text/html, */*;q=0.8", "R@1 / R@5 / R@10", "data/tmp/x", "/ home",
    "{endpoint}/api/models", "$HOME/x/y", "data/*/x.parquet", "</s>", "<a></b>", "C++/Java/Go", "run.json#/config/lr",
    "/path/to/model", "> /dev/null", "homem /mulher", "😀/😂/🤣", "a: b/c", "//cdn.example.org/x/y", "\\frac{a}{b}",
    "text_cfg.hf_model_name", "localhost:7860/gradio_api/x", "seu(s)/sua(s)/x", "zip://*.jpg::hf://datasets/a/b.zip",
    "[docs](/docs/hub/model-cards)", '<a href="/spaces/a/b">', "GET /api/models/x", "use `POST /api/repos/create`",
    "data:image/jpeg;base64,/9j/" + LETTERS + LETTERS + "/a/b", "\\\\nYou are\\\\nfoo\\\\nbar",
    "[^\\\\r\\\\n]|\\\\s+\\\\w",
    "\\\\ \\alpha", "{scheme}://bucket/a/b", "// see a/b", "data/**/x/y.parquet", "shard-*/x/y.parquet", "a_/b/c",
    "**forte**/fraco/x", "1–2/3/4",
)  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("around", ["{}", "see {}, please", "'{}'", "--model={}", "x:{}", "({})", "<code>{}</code>"])
def test_an_absolute_path_of_any_root_is_found_and_hidden(path, around):
    if path.startswith("//") and around == "x:{}":
        return  # it would be a URL
    text = around.format(path)
    assert find_machine_path(text), text
    hidden = hide_paths(text)
    assert find_machine_path(hidden) is None and "maria" not in hidden and "ana" not in hidden, hidden


@pytest.mark.parametrize("text", NO_PATHS)
def test_text_without_absolute_paths_is_unchanged(text):
    assert find_machine_path(text) is None, text
    assert hide_paths(text) in (text, text.rpartition("/")[2]), text


@pytest.mark.parametrize(
    "around", ["**{}**", "see *{}*", "_{}_", "__{}__", "–{}", "#{}", "&{}", "…{}", "a → {}", "a→{}", "· {}", "[x]({})"]
)
def test_a_path_is_found_after_punctuation(around):
    text = around.format("/data1/maria/fotos")
    assert find_machine_path(text) and find_machine_path(hide_paths(text)) is None


def test_paths_in_urls_links_and_lists_are_found():
    for text in (
        "file:///tmp/x/y", "sqlite:////gpfs/maria/x.db", "zip://1.jpg::/data1/maria/x.zip", '"/data1"',
        "[a](/docs/../home/maria/x)", "[a](/docs/x, /gpfs/maria/y)", "[a](/home/maria/x)", 'src="/data1/maria/x.png"',
        "GET /../home/maria/x", f"GET {Path.cwd()}/x", f"[a]({Path.cwd()}/x)",
    ):  # fmt: skip
        assert find_machine_path(text), text
    assert hide_paths("PATH=/usr/bin/x:/home/maria/bin") == "PATH=bin"
    assert hide_paths("in /data1/maria/x:12") == "in x:12"
    assert hide_paths("--model=/home/maria silva/run one") == "--model=run one"
    assert hide_paths({"a": ["/srv/x/y", {"b": "/gpfs/z.json"}], "/a/c": 3}) == {"a": ["y", {"b": "z.json"}], "c": 3}
    assert hide_paths(f"open_clip:local-dir:{Path.cwd()}/runs/x") == "open_clip:local-dir:runs/x"
    with pytest.raises(ValueError, match=r"/a/x.*/b/x"):
        hide_paths({"/a/x": 1, "/b/x": 2})


def test_the_documentation_of_this_project_has_no_false_alarms():
    patterns = ("*.md", "docs/**/*.md", "configs/*.yaml", "hub_upload/**/*.j2", "modeling_capivara/*.py")
    files = [path for pattern in patterns for path in ROOT.glob(pattern)]
    paths = {file.name: find_machine_path(file.read_text(encoding="utf-8")) for file in files}
    expected = {"immich.md": "/cache", "cluster.md": "/bin/bash"}  # in Immich's container; the first line of a job
    assert {name: path for name, path in paths.items() if path} == expected
    assert yaml.safe_load((ROOT / "configs/capivara.yaml").read_text(encoding="utf-8"))


def test_the_checkout_is_a_local_path_but_not_its_parent(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert str(ROOT) in local_paths() and str(ROOT.parent) not in {*local_paths()} - {str(Path.home())}


def test_short_names_of_datasets_hide_home_folders(monkeypatch, tmp_path):
    home = tmp_path / "home" / "maria"
    (home / "captions" / "train").mkdir(parents=True)
    monkeypatch.setattr(Path, "home", lambda: home)
    for folder in (tmp_path, tmp_path / "home", home / "captions"):
        monkeypatch.chdir(folder)
        assert short_name(str(home / "captions")) in ("captions", "."), folder
    monkeypatch.chdir(home)
    assert short_name(str(home / "captions" / "train")) == short_name("captions/train") == "captions/train"
    assert short_name("laicsiifes/flickr30k-pt-br") == "laicsiifes/flickr30k-pt-br"
    assert short_name("/gpfs/users/maria/captions") == short_name("~maria/captions") == "captions"
    assert short_name("../../maria/captions") == "captions" and short_name("a/b/*.parquet") == "b/*.parquet"


def test_untrusted_text_is_printed_without_secrets_and_control_characters():
    token = "hf_" + "a1B2" * 9
    assert redact(f"Bearer {SECRET} {token}: https://me:pass@host/x?X-Amz-Signature=ab12&b=1") == (
        "Bearer *** hf_***: https://***@host/x?X-Amz-Signature=***&b=1"
    )
    assert make_printable(f"pão\x1b[31m\r\u202e\x9b\n{token}") == r"pão\x1b[31m\r\u202e\x9b" + "\nhf_***"


@pytest.mark.slow
def test_long_texts_take_linear_time():
    started = time.perf_counter()
    texts = ("/a" * 50_000, "//" * 50_000 + "a", "a/" * 50_000, "/" * 100_000, "C:\\" * 30_000, "hf_" * 30_000)
    texts += ("\\" * 100_000, "/path/to," * 10_000, "x:" * 50_000 + "/ ", "x://a:" * 20_000, "bearer:" * 20_000)
    for text in texts:
        find_machine_path(text), hide_paths(text), find_secret(text), redact(text)
    assert time.perf_counter() - started < 10, "quadratic time"
