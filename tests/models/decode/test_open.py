"""What `--dtype` opens: a quantized GGUF file runs in its own bits, which nothing rounds again."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import nn

from models.base.errors import UsageError
from models.checkpoint.folder import load_model, save_model
from models.checkpoint.gguf import write_gguf
from models.decode.engine.draft import NestedDraft
from models.decode.engine.engine import stream
from models.decode.engine.trimmed_head import TrimmedHead
from models.decode.open import open_for_decoding
from models.decode.sampling.params import SamplingParams
from models.decode.tune.resolve import choose_drafting
from models.elastic.config import ElasticConfig
from models.elastic.granularity import FULL, Granularity
from models.elastic.model import ElasticLM
from models.elastic.owned import Owned
from models.elastic.ownership import Ownership
from models.elastic.request import Request
from models.elastic.view import View
from models.kernels.blocks import BlockTensor
from models.kernels.build import library
from models.packed.quantize import FILE, is_in_blocks, pack, packed_bytes

IDS = [(7 * position + 3) % 64 for position in range(60)]
ROUNDING = 0.06
"""Of the norm of logits: inputs of 8 bits, with a scale for each block of 32, in every product."""


@pytest.fixture(autouse=True)
def _compiled() -> None:
    if library() is None:
        pytest.skip("needs a C compiler")


def write_file(config: ElasticConfig, path: Path, kinds: Mapping[str, str], **changes: Any) -> Path:
    """Write a model whose matrices have the format that their layer or name begins with."""
    model = ElasticLM(dataclasses.replace(config, **changes))
    model.init_weights(torch.Generator().manual_seed(0))
    plain = write_gguf(model, path.with_suffix(".plain"), dtype="fp32")
    reader, writer = gguf.GGUFReader(plain), gguf.GGUFWriter(path, "llama")
    for name, field in reader.fields.items():
        if not name.startswith(("GGUF.", "general.architecture")):
            writer.add_key_value(name, field.contents(), field.types[0])
    for tensor in reader.tensors:
        kind = next((kinds[start] for start in kinds if tensor.name.startswith(start)), None)
        if kind is None or len(tensor.shape) == 1:
            writer.add_tensor(tensor.name, np.array(tensor.data))
        else:
            quantization = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(
                tensor.name, gguf.quants.quantize(np.array(tensor.data), quantization), raw_dtype=quantization
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def file(tiny_config: ElasticConfig, tmp_path: Path) -> Path:
    kinds = {"token": "Q8_0", "blk.1": "Q4_1", "blk": "Q4_0"}
    return write_file(tiny_config, tmp_path / "m.gguf", kinds, intermediate_size=96)


def logits(model: ElasticLM, ids: list[int] = IDS) -> torch.Tensor:
    with torch.inference_mode():
        return model.run([Request(ids, model.new_cache(64), len(ids))])


@pytest.mark.parametrize("dtype", ["auto", "file"])
def test_a_quantized_file_runs_in_its_own_bits(dtype: str, file: Path) -> None:
    folder, name = open_for_decoding(file, dtype)
    assert name == "file"
    assert is_in_blocks(folder.model)
    assert packed_bytes(folder.model) < 1.3 * file.stat().st_size  # heads of 8 fill panels of 32
    exact_TV = logits(load_model(file, dtype=torch.float32).model)
    found_TV = logits(folder.model)
    assert (found_TV - exact_TV).norm() < ROUNDING * exact_TV.norm()
    with torch.inference_mode():  # passes over whole rows are torch's
        torchs_TV = folder.model(torch.tensor([IDS]))[0]
    assert (torchs_TV - exact_TV).norm() < ROUNDING * exact_TV.norm()


def test_a_tokens_result_depends_on_no_companion(file: Path) -> None:
    model = open_for_decoding(file, "file")[0].model
    whole_TV = logits(model)
    with torch.inference_mode():
        cache, found = model.new_cache(64), []
        for token in IDS[:20]:
            found.append(model.run([Request([token], cache, 1), Request([5, 9], model.new_cache(4), 1)])[:1])
            cache.commit(1)
    assert torch.cat(found).equal(whole_TV[:20])


@pytest.mark.parametrize(
    "text", ["full", "ffn=0.5", "ffn=0.3,heads=0.5,layers=0:3", "layers=0-1", "S@int8", "S@bf16"]
)
def test_any_member_drafts_for_it_and_changes_no_token(text: str, file: Path) -> None:
    folder, _ = open_for_decoding(file, "file")
    drafting = choose_drafting(folder, text, 3, SamplingParams())
    plain, drafted = (
        [token.id for token in stream(folder.model, IDS[:4], draft=draft, gamma=3, max_new_tokens=40)]
        for draft in (None, drafting.draft)
    )
    assert plain == drafted
    if "@" not in text:
        assert drafting.extra_bytes == 0


def test_a_head_of_another_format_is_rounded_once_and_layers_stay_as_they_are(
    tiny_config: ElasticConfig, tmp_path: Path
) -> None:
    kinds = {"output.": "Q5_0", "token": "F16", "blk": "Q4_1"}
    path = write_file(
        tiny_config, tmp_path / "m.gguf", kinds, intermediate_size=96, tie_word_embeddings=False
    )
    folder, name = open_for_decoding(path)
    assert name == "file"
    assert not isinstance(folder.model.lm_head.weight, BlockTensor)
    exact_TV = logits(load_model(path, dtype=torch.float32).model)
    assert (logits(folder.model) - exact_TV).norm() < ROUNDING * exact_TV.norm()


def test_formats_without_kernels_are_dequantized_and_told(
    tiny_config: ElasticConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_file(tiny_config, tmp_path / "m.gguf", {"blk": "Q5_0"}, intermediate_size=96)
    assert open_for_decoding(path)[1] in ("fp32", "bf16")
    assert "Q5_0, which do not run as they are here" in caplog.text
    with pytest.raises(UsageError, match=r"--dtype file: .* holds Q5_0"):
        open_for_decoding(path, "file")


def test_a_folder_that_was_imported_from_a_file_is_not_warned_of(
    tiny_model: ElasticLM, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = save_model(tmp_path / "m", tiny_model, provenance={"quantizations": ["Q4_1"]})
    open_for_decoding(path)
    assert not caplog.text


def test_a_folder_as_it_is_stored(tiny_model: ElasticLM, tmp_path: Path) -> None:
    path = save_model(tmp_path / "model", tiny_model.to(torch.bfloat16))
    folder, name = open_for_decoding(path, "file")
    assert (name, folder.model.dtype) == ("bf16", torch.bfloat16)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_a_folder_is_read_where_it_is_mapped_and_gives_the_same_bits(
    dtype: str, tiny_model: ElasticLM, tmp_path: Path
) -> None:
    path = save_model(tmp_path / "model", tiny_model.to(torch.bfloat16))
    folder, _ = open_for_decoding(path, dtype)
    assert folder.model.is_mapped
    copied = load_model(path, dtype=torch.bfloat16 if dtype == "bf16" else torch.float32)
    assert not copied.model.is_mapped
    assert logits(folder.model).equal(logits(pack(copied.model, dtype)))


def test_a_draft_of_few_tokens_keeps_the_heads_blocks(file: Path) -> None:
    folder, _ = open_for_decoding(file, "file")
    ids_N = torch.tensor([3, 9, 40])
    few = TrimmedHead(View(folder.model, FULL), ids_N)
    with torch.inference_mode():
        rows_TV = few.run([Request(IDS, folder.model.new_cache(64), 4)])
    assert rows_TV[:, ids_N].equal(logits(folder.model)[-4:, ids_N])


def test_what_a_draft_owns_is_added_to_the_files_weights_in_8_bits(file: Path) -> None:
    member = Granularity.parse("ffn=0.5,layers=0:2")

    def target(in_blocks: bool) -> ElasticLM:
        model = load_model(file, in_blocks=in_blocks).model
        owned = Owned(model.config, "draft", member, Ownership(norms=True, rank=2))
        generator = torch.Generator().manual_seed(1)
        for parameter in owned.parameters():
            parameter.data.normal_(mean=float(parameter.ndim == 1), std=0.1, generator=generator)
        model.owned = nn.ModuleList([owned])
        return pack(model, FILE if in_blocks else "fp32")

    ours, theirs = target(in_blocks=True), target(in_blocks=False)
    with torch.inference_mode():
        ours_TV, theirs_TV = (
            one.run([Request(IDS, one.new_cache(64), len(IDS))], member) for one in (ours, theirs)
        )
    assert (ours_TV - theirs_TV).norm() < ROUNDING * theirs_TV.norm()
    plain, drafted = (
        [token.id for token in stream(ours, IDS[:4], draft=draft, gamma=3, max_new_tokens=20)]
        for draft in (None, NestedDraft(View(ours, member)))
    )
    assert plain == drafted
