"""Links that lead out of a dataset are refused; other links work."""

import json

import pytest
from caption_tars import PICTURES, files_of, sample, write_tar
from datasets import Dataset, DatasetDict

from capivara_common.files import AllowedFolders, check_folder_for_outside_links_and_pipes
from caption_data.sources import open_split


@pytest.fixture
def folder(tmp_path):
    """Dataset folder with an image and its metadata; a secret image lies next to the folder."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.png").write_bytes(PICTURES[1])
    (tmp_path / "secret.png").write_bytes(PICTURES[2])
    names = ["a.png", "b.png"]
    lines = "".join(json.dumps({"file_name": name, "captions-pt": ["x"]}) + "\n" for name in names)
    (tmp_path / "data" / "metadata.jsonl").write_text(lines, encoding="utf-8")
    return tmp_path / "data"


def test_an_image_that_links_out_of_the_dataset_is_not_read(folder):
    (folder / "b.png").symlink_to("../secret.png")
    assert files_of(folder) == [PICTURES[1], None]
    assert files_of(folder, image_roots=[folder.parent]) == [PICTURES[1], PICTURES[2]], (
        "unless the user allows the folder"
    )
    with pytest.raises(ValueError, match=r"\['b\.png'\]"):
        check_folder_for_outside_links_and_pipes(folder)
    (folder / "b.png").unlink()
    (folder / "more").symlink_to("..", target_is_directory=True)
    with pytest.raises(ValueError, match=r"\['more'\]"):
        check_folder_for_outside_links_and_pipes(folder)
    assert not AllowedFolders(folder).contains(folder / "more" / "secret.png")
    assert AllowedFolders(folder, [folder.parent]).contains(folder / "more" / "secret.png")


def test_links_inside_the_dataset_and_a_linked_folder_work(folder):
    (folder / "b.png").symlink_to("a.png")
    (folder.parent / "link").symlink_to("data", target_is_directory=True)
    for path in (folder, folder.parent / "link"):
        check_folder_for_outside_links_and_pipes(path)
        assert files_of(path) == [PICTURES[1], PICTURES[1]]


@pytest.mark.parametrize("inner", ["", "train"])
def test_a_snapshot_in_the_hubs_cache_works(folder, inner):
    repository = folder.parent / "datasets--me--mine"
    snapshot = repository / "snapshots" / "0a1b" / inner
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (folder / "b.png").write_bytes(PICTURES[2])
    for number, file in enumerate(folder.iterdir()):
        file.rename(repository / "blobs" / str(number))
        (snapshot / file.name).symlink_to(repository / "blobs" / str(number))
    check_folder_for_outside_links_and_pipes(snapshot)
    assert None not in files_of(snapshot)
    (snapshot / "c.png").symlink_to(folder.parent / "secret.png")
    with pytest.raises(ValueError, match=r"c\.png"):
        check_folder_for_outside_links_and_pipes(snapshot)


def test_lists_archives_and_tables_that_link_out_are_refused(folder, tmp_path):
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "metadata.jsonl").symlink_to(folder / "metadata.jsonl")
    with pytest.raises(ValueError, match=r"\['metadata\.jsonl'\]"):
        open_split(str(tmp_path / "lists"), "train", "image")
    write_tar(tmp_path / "0.tar", sample(1))
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "0.tar").symlink_to(tmp_path / "0.tar")
    with pytest.raises(ValueError, match=r"\['0\.tar'\]"):
        open_split(str(tmp_path / "shards" / "*.tar"), "train", "image")
    assert len(open_split(str(tmp_path / "shards" / "0.tar"), "train", "image")) == 1, (
        "the user has named the linked file itself"
    )
    DatasetDict(train=Dataset.from_dict({"image": [PICTURES[1]]})).save_to_disk(tmp_path / "saved")
    table = next((tmp_path / "saved" / "train").glob("*.arrow"))
    table.rename(tmp_path / "elsewhere.arrow")
    table.symlink_to(tmp_path / "elsewhere.arrow")
    with pytest.raises(ValueError, match=r"saved.*\.arrow"):
        open_split(str(tmp_path / "saved"), "train", "image")
