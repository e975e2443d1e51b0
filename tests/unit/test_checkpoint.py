"""Spans come out of every layout of checkpoint, and what is wrong with one is said in a line."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import socket
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors.torch import load_file
from torch import Tensor

from compute import models, sources
from compute.checkpoint import Checkpoint, HubCheckpoint
from compute.errors import CheckpointError, ModelNotFound
from compute.models import find_checkpoint
from tests.checkpoints import make_checkpoint, make_model, save_weights

Format = Literal["safetensors", "bin"]
FIRST_BLOCKS = "model-00002-of-00004.safetensors"  # of five blocks in shards of two
LAST_BLOCKS = "model-00004-of-00004.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "tiny", tokenizer=False)


def weights(folder: Path) -> dict[str, Tensor]:
    return Checkpoint.open(folder).load_span(0, 5).state_dict()


def edit(folder: Path, file: str, name: str, value: Tensor | None) -> None:
    """Replace one tensor of a shard, or take it out."""
    state = load_file(str(folder / file))
    if value is None:
        del state[name]
    else:
        state[name] = value
    save_weights(folder / file, state)


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def fails(folder: Path, *says: str, start: int = 0, end: int = 5) -> None:
    """Loading ends in one line that holds every one of ``says``."""
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder).load_span(start, end)
    assert "\n" not in str(caught.value)
    for words in says:
        assert words in str(caught.value)


@pytest.mark.parametrize("format", ["safetensors", "bin"])
@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("shards_of_blocks", [None, 1, 2])
def test_every_layout_gives_the_same_weights(
    tmp_path: Path, format: Format, prefix: bool, shards_of_blocks: int | None
) -> None:
    checkpoint = Checkpoint.open(
        make_checkpoint(tmp_path, format=format, prefix=prefix, shards_of_blocks=shards_of_blocks, tokenizer=False)
    )
    expected = make_model().state_dict()
    span = checkpoint.load_span(1, 4)
    for index, block in enumerate(span.blocks, 1):
        for name, tensor in block.state_dict().items():
            assert torch.equal(tensor, expected[f"transformer.h.{index}.{name}"])
    for name, tensor in checkpoint.load_embeddings().state_dict().items():
        assert torch.equal(tensor, expected[f"transformer.{name}"])
    head = checkpoint.load_head()
    assert torch.equal(head.ln_f.weight, expected["transformer.ln_f.weight"])
    assert torch.equal(head.lm_head.weight, expected["lm_head.weight"])


def test_what_transformers_saves_is_read(tmp_path: Path) -> None:
    model = make_model()
    model.save_pretrained(tmp_path, max_shard_size="250KB")
    assert (tmp_path / INDEX).is_file()
    checkpoint = Checkpoint.open(tmp_path)
    assert (checkpoint.n_blocks, checkpoint.config.n_head, checkpoint.config.pad_token_id) == (5, 6, 3)
    expected = model.transformer.h[4].state_dict()
    loaded = checkpoint.block(4)
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


@pytest.mark.parametrize("format", ["safetensors", "bin"])
def test_only_the_shards_of_the_span_are_opened(tmp_path: Path, format: Format) -> None:
    folder = make_checkpoint(tmp_path, format=format, tokenizer=False)
    (shard,) = folder.glob("*-00003-of-00004.*")
    for other in folder.glob("*-of-00004.*"):
        if other != shard:
            other.unlink()
    checkpoint = Checkpoint.open(folder)
    assert len(checkpoint.load_span(2, 4)) == 2
    with pytest.raises(CheckpointError, match="00002-of-00004"):
        checkpoint.load_span(1, 3)


def test_weights_outlive_their_file(folder: Path) -> None:
    span = Checkpoint.open(folder).load_span(0, 1)
    before = {name: tensor.clone() for name, tensor in span.state_dict().items()}
    path = folder / FIRST_BLOCKS
    path.write_bytes(bytes(path.stat().st_size))
    assert all(torch.equal(tensor, before[name]) for name, tensor in span.state_dict().items())


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes_are_converted(tmp_path: Path, stored: torch.dtype, wanted: torch.dtype) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path, layers=1, dtype=stored, tokenizer=False))
    assert checkpoint.load_span(0, 1, wanted).dtype == wanted
    assert checkpoint.load_embeddings(wanted).word_embeddings.weight.dtype == wanted


def test_progress_is_told(folder: Path) -> None:
    told: list[tuple[int, int]] = []
    Checkpoint.open(folder).load_span(1, 4, progress=lambda done, total: told.append((done, total)))
    assert told == [(0, 3), (1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize(("start", "end"), [(0, 0), (3, 2), (-1, 2), (0, 6)])
def test_a_span_outside_the_model_is_refused(folder: Path, start: int, end: int) -> None:
    with pytest.raises(ValueError, match="not within the 5 blocks"):
        Checkpoint.open(folder).load_span(start, end)


def test_head_shares_the_embeddings_matrix(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    embeddings = checkpoint.load_embeddings()
    head = checkpoint.load_head(embeddings=embeddings)
    assert head.lm_head.weight.data_ptr() == embeddings.word_embeddings.weight.data_ptr()
    assert torch.equal(head.lm_head.weight, checkpoint.load_head().lm_head.weight)


def test_an_untied_head_is_read(folder: Path) -> None:
    matrix = torch.randn(320, 48, generator=torch.Generator().manual_seed(1))
    edit(folder, LAST_BLOCKS, "lm_head.weight", matrix)
    path = folder / INDEX
    weight_map = json.loads(path.read_text())["weight_map"]
    edit_json(path, weight_map=weight_map | {"lm_head.weight": LAST_BLOCKS})
    assert not torch.equal(Checkpoint.open(folder).load_head().lm_head.weight, matrix)
    edit_json(folder / "config.json", tie_word_embeddings=False)
    assert torch.equal(Checkpoint.open(folder).load_head().lm_head.weight, matrix)


# Digests


def test_digests_tell_weights_apart(tmp_path: Path) -> None:
    one = Checkpoint.open(make_checkpoint(tmp_path / "one", tokenizer=False))
    same = Checkpoint.open(make_checkpoint(tmp_path / "same", format="bin", prefix=False, tokenizer=False))
    other = Checkpoint.open(make_checkpoint(tmp_path / "other", seed=1, tokenizer=False))
    span = one.load_span(1, 3)
    assert span.block_digests == (one.block_digest(1), one.block_digest(2))
    assert len(set(span.block_digests)) == 2
    assert span.digest == same.load_span(1, 3, torch.bfloat16).digest != other.load_span(1, 3).digest
    assert span.part(2, 3).digest == one.load_span(2, 3).digest
    assert one.digest == other.digest != same.digest


def test_digests_stay_what_they_are(folder: Path) -> None:
    """Nodes compare them, so a change of definition is a change of protocol."""
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.digest == "333b005a6dbe660b7a777a9e0eda2516cfa36a9e6c096e150b6f2dc1430197d4"
    block = hashlib.sha256()
    for name, tensor in sorted(load_file(str(folder / LAST_BLOCKS)).items()):
        if name.startswith("transformer.h.4."):
            shape = ",".join(map(str, tensor.shape))
            block.update(f"{name.removeprefix('transformer.')}\0float32\0{shape}\0".encode())
            block.update(tensor.numpy().tobytes())
    assert checkpoint.block_digest(4) == block.hexdigest()
    assert checkpoint.load_span(4, 5).digest == hashlib.sha256(block.hexdigest().encode()).hexdigest()


def test_a_model_digest_needs_no_weights(folder: Path) -> None:
    before = Checkpoint.open(folder).digest
    for shard in folder.glob("*.safetensors"):
        shard.unlink()
    assert Checkpoint.open(folder).digest == before
    edit_json(folder / "config.json", layer_norm_epsilon=1e-6)
    assert Checkpoint.open(folder).digest != before


@pytest.mark.parametrize("format", ["safetensors", "bin"])
def test_a_single_file_has_a_model_digest(tmp_path: Path, format: Format) -> None:
    folder = make_checkpoint(tmp_path, format=format, shards_of_blocks=None, tokenizer=False)
    assert len(Checkpoint.open(folder).digest) == 64


# What is wrong with a checkpoint


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        Checkpoint.open(tmp_path / "none")


def test_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    fails(folder, "config.json is missing")


@pytest.mark.parametrize(
    ("text", "says"),
    [("{", "not JSON"), ("[]", "not a JSON object"), ("[" * 100_000, "not JSON"), ("\xff", "not JSON")],
)
def test_a_broken_config(folder: Path, text: str, says: str) -> None:
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    fails(folder, "config.json", says)


def test_another_architecture(folder: Path) -> None:
    edit_json(folder / "config.json", model_type="llama")
    fails(folder, "'llama'", "choose a BLOOM checkpoint")


def test_no_weights(folder: Path) -> None:
    (folder / INDEX).unlink()
    fails(folder, "no weights", INDEX)


@pytest.mark.parametrize("content", [{}, {"weight_map": []}, {"weight_map": {}}])
def test_an_index_without_a_map(folder: Path, content: dict[str, object]) -> None:
    (folder / INDEX).write_text(json.dumps(content))
    fails(folder, INDEX, "weight_map")


def test_an_enormous_index(folder: Path) -> None:
    with (folder / INDEX).open("r+b") as file:
        file.truncate((64 << 20) + 1)
    fails(folder, INDEX, "larger than")


@pytest.mark.parametrize(
    "file",
    ["../x.safetensors", "/x.safetensors", "a/b.safetensors", "..", "a\\b.safetensors", "x.bin", "", 7],
)
def test_an_index_that_names_more_than_a_file(folder: Path, file: object) -> None:
    path = folder / INDEX
    weight_map = json.loads(path.read_text())["weight_map"]
    edit_json(path, weight_map=weight_map | {"transformer.h.0.input_layernorm.weight": file})
    fails(folder, INDEX, "plain")


def test_a_name_twice(folder: Path) -> None:
    path = folder / INDEX
    weight_map = json.loads(path.read_text())["weight_map"]
    edit_json(path, weight_map=weight_map | {"h.0.input_layernorm.weight": FIRST_BLOCKS})
    fails(folder, "h.0.input_layernorm.weight is there twice")


def test_a_missing_shard(folder: Path) -> None:
    (folder / FIRST_BLOCKS).unlink()
    fails(folder, FIRST_BLOCKS, "is missing")


def test_a_folder_in_place_of_a_shard(folder: Path) -> None:
    (folder / FIRST_BLOCKS).unlink()
    (folder / FIRST_BLOCKS).mkdir()
    fails(folder, FIRST_BLOCKS, "is missing")


def test_links_as_in_the_hub_cache(folder: Path, tmp_path: Path) -> None:
    (folder / FIRST_BLOCKS).rename(tmp_path / "blob")
    (folder / FIRST_BLOCKS).symlink_to(tmp_path / "blob")
    assert len(Checkpoint.open(folder).load_span(0, 2)) == 2


@pytest.mark.parametrize("format", ["safetensors", "bin"])
@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, 0.99])
def test_a_truncated_shard(tmp_path: Path, format: Format, keep: float) -> None:
    folder = make_checkpoint(tmp_path, format=format, tokenizer=False)
    (shard,) = folder.glob("*-00002-of-00004.*")
    size = shard.stat().st_size
    os.truncate(shard, int(keep * size) if 0 < keep < 1 else int(keep))
    fails(folder, shard.name, "cut short", "get the file again")


def test_a_header_beyond_reason(folder: Path) -> None:
    (folder / FIRST_BLOCKS).write_bytes((1 << 40).to_bytes(8, "little") + bytes(100))
    fails(folder, FIRST_BLOCKS, "a header of")


def test_a_pickle_that_would_run_code(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "pwned"),)

    folder = make_checkpoint(tmp_path / "m", format="bin", tokenizer=False)
    torch.save({"x": Evil()}, folder / "pytorch_model-00002-of-00004.bin")
    fails(folder, "pytorch_model-00002-of-00004.bin", "safetensors form")
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("content", [[torch.zeros(1)], {"x": 1}, {1: torch.zeros(1)}])
def test_a_bin_file_of_something_else(tmp_path: Path, content: object) -> None:
    folder = make_checkpoint(tmp_path, format="bin", tokenizer=False)
    torch.save(content, folder / "pytorch_model-00002-of-00004.bin")
    fails(folder, "pytorch_model-00002-of-00004.bin", "get the file again")


def test_bin_files_that_cannot_be_read_are_told_in_whole_sentences(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, format="bin", tokenizer=False)
    file = folder / "pytorch_model-00002-of-00004.bin"
    whole = file.read_bytes()
    other_archive = io.BytesIO()
    with zipfile.ZipFile(other_archive, "w") as archive:
        archive.writestr("letter.txt", "Dear Sir or Madam")
    for content in (b"", b"no archive", whole[:-100], other_archive.getvalue()):
        file.write_bytes(content)
        with pytest.raises(CheckpointError) as caught:
            Checkpoint.open(folder).load_span(0, 2)
        assert str(caught.value).endswith("; get the file again, or use the safetensors form of the checkpoint")
        assert "mmap" not in str(caught.value)  # torch's first guess, which is beside the point
    torch.save({"x": Path("x")}, file)
    fails(
        folder, file.name, "something other than tensors, which is not loaded because it could run code; use the safe"
    )


def test_a_tensor_that_the_index_lacks(folder: Path) -> None:
    path = folder / INDEX
    weight_map = json.loads(path.read_text())["weight_map"]
    del weight_map["transformer.h.0.mlp.dense_h_to_4h.bias"]
    edit_json(path, weight_map=weight_map)
    fails(folder, "h.0.mlp.dense_h_to_4h.bias is missing")


def test_a_tensor_that_the_shard_lacks(folder: Path) -> None:
    edit(folder, FIRST_BLOCKS, "transformer.h.0.mlp.dense_h_to_4h.bias", None)
    fails(folder, "h.0.mlp.dense_h_to_4h.bias", FIRST_BLOCKS)


def test_a_tensor_that_bloom_lacks(folder: Path) -> None:
    path = folder / INDEX
    weight_map = json.loads(path.read_text())["weight_map"]
    edit_json(path, weight_map=weight_map | {"transformer.h.0.mlp.gate.weight": FIRST_BLOCKS})
    fails(folder, "unknown tensor h.0.mlp.gate.weight")


def test_a_wrong_shape(folder: Path) -> None:
    edit(folder, FIRST_BLOCKS, "transformer.h.1.self_attention.dense.weight", torch.zeros(48, 47))
    fails(folder, "h.1.self_attention.dense.weight", "[48, 47]", "[48, 48]")


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8])
def test_a_wrong_dtype(folder: Path, dtype: torch.dtype) -> None:
    edit(folder, FIRST_BLOCKS, "transformer.h.1.input_layernorm.bias", torch.zeros(48, dtype=dtype))
    fails(folder, "h.1.input_layernorm.bias", "float16, bfloat16 or float32")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite(folder: Path, value: float) -> None:
    bias = torch.zeros(48)
    bias[47] = value
    edit(folder, FIRST_BLOCKS, "transformer.h.1.input_layernorm.bias", bias)
    fails(folder, "h.1.input_layernorm.bias", "NaN or infinity", FIRST_BLOCKS)


def test_weights_that_do_not_fit(folder: Path) -> None:
    edit(folder, FIRST_BLOCKS, "transformer.h.1.input_layernorm.bias", torch.full((48,), 1e6))
    with pytest.raises(CheckpointError, match=r"does not fit into torch\.float16"):
        Checkpoint.open(folder).load_span(0, 2, torch.float16)


# The hub, and names


class FakeHub:
    """``hf_hub_download`` out of a folder; notes what is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[str] = []

    def __call__(self, repo_id: str, filename: str, *, revision: str | None, local_files_only: bool) -> str:
        assert (repo_id, revision, local_files_only) == ("org/tiny", "v1", False)
        self.asked.append(filename)
        path = self.folder / filename
        if not path.is_file():
            raise EntryNotFoundError(f"404: {filename}")
        return str(path)

    def shards(self) -> list[str]:
        return [name for name in self.asked if "-of-" in name]


def use_hub(patch: pytest.MonkeyPatch, download: Callable[..., str]) -> None:
    """A hub that answers, and whose files ``download`` gives."""
    patch.setattr(huggingface_hub, "get_hf_file_metadata", lambda url, timeout: None)
    patch.setattr(huggingface_hub, "hf_hub_download", download)


def test_only_the_shards_of_the_span_are_downloaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = FakeHub(folder)
    use_hub(monkeypatch, hub)
    checkpoint = HubCheckpoint("org/tiny", "v1")
    assert (checkpoint.name, checkpoint.label, hub.asked) == ("tiny", "org/tiny", [])
    assert checkpoint.digest == Checkpoint.open(folder).digest
    assert hub.shards() == []
    checkpoint.load_span(0, 2)
    assert hub.shards() == [FIRST_BLOCKS]
    checkpoint.load_head(embeddings=checkpoint.load_embeddings())
    assert hub.shards() == [FIRST_BLOCKS, "model-00001-of-00004.safetensors", LAST_BLOCKS]
    checkpoint.load_span(0, 1)
    assert len(hub.asked) == len(set(hub.asked))


def test_a_hub_model_without_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_checkpoint(tmp_path, format="bin", tokenizer=False)
    use_hub(monkeypatch, FakeHub(folder))
    assert len(HubCheckpoint("org/tiny", "v1").load_span(0, 5)) == 5


def test_the_first_file_fixes_the_commit(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = folder.rename(tmp_path / ("ab" * 20))
    revisions: list[str | None] = []

    def download(repo_id: str, filename: str, *, revision: str | None, **_: object) -> str:
        revisions.append(revision)
        return str(snapshot / filename)

    use_hub(monkeypatch, download)
    HubCheckpoint("org/tiny").load_span(0, 1)
    assert revisions[0] is None
    assert set(revisions[1:]) == {"ab" * 20}


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (LocalEntryNotFoundError("offline"), "cannot be reached"),
        (ConnectionError("reset\nby peer"), r"cannot be fetched \(reset\)"),
    ],
)
def test_a_hub_that_does_not_answer(monkeypatch: pytest.MonkeyPatch, error: Exception, says: str) -> None:
    def download(*args: object, **kwargs: object) -> str:
        raise error

    use_hub(monkeypatch, download)
    with pytest.raises(CheckpointError, match=says) as caught:
        _ = HubCheckpoint("org/tiny").config
    assert "\n" not in str(caught.value)


def test_a_hub_that_cannot_be_reached_is_not_waited_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch, hub_address: str
) -> None:
    """The hub's own client would try again and again, for half a minute."""
    asked: list[bool] = []

    def download(repo_id: str, filename: str, *, local_files_only: bool, **_: object) -> str:
        asked.append(local_files_only)
        if filename != "config.json":
            raise LocalEntryNotFoundError("not in the cache")
        return str(folder / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(sources, "HUB_ANSWER_S", 0.2)
    began = time.monotonic()
    checkpoint = HubCheckpoint("org/tiny")
    assert checkpoint.n_blocks == 5  # what is in the cache can be used
    with pytest.raises(CheckpointError, match="is not in the local cache and the hub cannot be reached"):
        _ = checkpoint.digest
    assert time.monotonic() - began < 2
    assert set(asked) == {True}


@pytest.fixture(params=["refuses", "is silent", "is overloaded"])
def hub_address(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Makes the hub a server on this machine that is of no use."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if request.param != "refuses":
            server.listen()
        if request.param == "is overloaded":
            threading.Thread(target=_overloaded, args=(server,), daemon=True).start()
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        yield address


def _overloaded(server: socket.socket) -> None:
    connection, _ = server.accept()
    with connection:
        connection.recv(65536)
        connection.sendall(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n")


def test_finding_by_path_name_and_hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "_SHIPPED_FOLDER", tmp_path)
    assert models.shipped_models() == ["tiny"]
    assert find_checkpoint(str(folder)).name == "tiny"
    assert find_checkpoint("tiny").label == str(folder)
    hub = find_checkpoint("bigscience/bloom-560m")
    assert isinstance(hub, HubCheckpoint)
    assert hub.name == "bloom-560m"


def test_what_is_no_path_is_no_folder(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder here that is called like a model that ships is not taken for it."""
    monkeypatch.setattr(models, "_SHIPPED_FOLDER", tmp_path)
    here = tmp_path / "here"
    for name in ("tiny", "other"):
        shutil.copytree(folder, here / name)
    monkeypatch.chdir(here)
    assert find_checkpoint("tiny").label == str(folder)
    assert find_checkpoint("./tiny").label == "tiny"
    assert find_checkpoint("../here/other").label == "../here/other"
    with pytest.raises(ModelNotFound, match=r"for the folder of that name here, write \./other"):
        find_checkpoint("other")


@pytest.mark.parametrize("name", ["", "bloom", "./no/such", "/no/such", "a/b/c", "../x", "org/..", "a b/c"])
@pytest.mark.usefixtures("folder")
def test_a_name_that_nothing_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(models, "_SHIPPED_FOLDER", tmp_path)
    with pytest.raises(ModelNotFound, match=r"shipped models \(tiny\), the path"):
        find_checkpoint(name)


def test_the_hub_may_be_left_out() -> None:
    with pytest.raises(ModelNotFound):
        find_checkpoint("bigscience/bloom-560m", allow_hub=False)
