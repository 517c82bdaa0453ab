"""Documents packed in one row: blind to each other on both ways, and the same numbers on both."""

from collections.abc import Callable, Mapping

import pytest
import torch
import varlen_on_cpu
from tests.rank_pool import RankPool
from tiny_models import tiny_model
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import PreTrainedModel

from hypershard.config.schema import MODEL_TYPES, ModelConfig, ParallelConfig
from hypershard.distributed.mesh import build_mesh
from hypershard.distributed.process_group import World
from hypershard.models import attention_modules
from hypershard.models.attention_modules import varlen_attention
from hypershard.models.family import family_of
from hypershard.models.llama4 import chunks_follow_documents
from hypershard.parallel.activation import checkpoint_activations
from hypershard.parallel.fsdp import shard
from hypershard.train.attention import Attention, Segments, segments
from hypershard.train.loss import LanguageModel

CPU = torch.device("cpu")
# Rows of 48: three documents, one longer than windows (12) and chunks (16); one document; many, one of a single token.
LENGTHS = ([5, 30, 13], [48], [1, 2, 17, 20, 8])
ROWS = torch.stack([torch.cat([torch.arange(length) for length in lengths]) for lengths in LENGTHS])
HEAD_CASES = [
    pytest.param(model_type, changes, id=f"{model_type}-{changes}")
    for model_type in MODEL_TYPES
    for changes in ({}, {"num_key_value_heads": 4})
    if not (changes and model_type in ("llama_v2", "gpt2"))
]
EXPERTS = ("mixtral", "llama4")
Options = Mapping[str, Segments]


def a_model(model: ModelConfig, path: str) -> PreTrainedModel:
    """A model with first weights large enough for attention to tell tokens apart, the same ones on either path."""
    torch.manual_seed(0)
    hf_model = family_of(model.model_type).build(model, path=path).to_empty(device="cpu")
    family_of(model.model_type).restore_buffers(hf_model)
    for spec in family_of(model.model_type).parameters(model):
        weight = hf_model.get_parameter(spec.name).data
        weight.fill_(1.0) if spec.init == "ones" else weight.normal_(0.0, 0.08)
    return hf_model


def options_of(model: ModelConfig, path: str, positions: torch.Tensor) -> Options:
    chunk_tokens = family_of(model.model_type).chunk_tokens(model)
    found = {"documents": segments(positions, chunk_tokens=None, device=CPU)} if path == "varlen" else {}
    return found | (
        {"chunks": segments(positions, chunk_tokens=chunk_tokens, device=CPU)} if found and chunk_tokens else {}
    )


def hidden_states(model: ModelConfig, path: str, ids: torch.Tensor, positions: torch.Tensor = ROWS) -> torch.Tensor:
    hf_model = a_model(model, path).eval()
    backbone = family_of(model.model_type).backbone(hf_model)
    with torch.no_grad():
        options = options_of(model, path, positions)
        return backbone(input_ids=ids, position_ids=positions, use_cache=False, **options).last_hidden_state


def document_slices() -> list[tuple[int, slice]]:
    """(row, its tokens) of every document in ROWS."""
    return [
        (row, slice(sum(lengths[:place]), sum(lengths[: place + 1])))
        for row, lengths in enumerate(LENGTHS)
        for place in range(len(lengths))
    ]


def test_segments_are_the_documents() -> None:
    borders, longest = segments(ROWS, chunk_tokens=None, device=CPU)
    assert borders.dtype == longest.dtype == torch.int32
    assert borders.tolist() == [0, 5, 35, 48, 96, 97, 99, 116, 136, 144]
    assert longest.shape == (48, 0)


def test_chunks_are_counted_from_each_documents_start() -> None:
    borders, longest = segments(ROWS, chunk_tokens=16, device=CPU)
    assert borders.tolist() == [0, 5, 21, 35, 48, 64, 80, 96, 97, 99, 115, 116, 132, 136, 144]
    assert longest.shape == (16, 0)


def test_a_document_does_not_go_on_in_the_next_row() -> None:
    continued = torch.stack([torch.arange(8), torch.arange(8, 16)])
    assert segments(continued, chunk_tokens=None, device=CPU)[0].tolist() == [0, 8, 16]
    assert segments(continued, chunk_tokens=6, device=CPU)[0].tolist() == [0, 6, 8, 12, 16]


@pytest.mark.parametrize("path", ["dense", "varlen"])
def test_no_document_sees_another(model: ModelConfig, path: str) -> None:
    """Each document is changed in turn: all others keep every bit, in its row and in the others.

    Models with experts: how many tokens share an expert decides how its products are summed, so 1e-5 there.
    """
    if model.model_type == "llama4" and path == "dense" and not chunks_follow_documents():
        pytest.skip("this transformers cuts chunks at the row's start")
    allowed = 1e-5 if model.model_type in EXPERTS else 0.0
    ids = torch.randint(0, 97, ROWS.shape)
    before = hidden_states(model, path, ids)
    for row, tokens in document_slices():
        other = ids.clone()
        other[row, tokens] = (other[row, tokens] + 1) % 97
        difference = (hidden_states(model, path, other) - before).abs().amax(-1)
        assert (difference[row, tokens] > 1e-2).all(), "the changed document itself must change"
        difference[row, tokens] = 0
        assert difference.max() <= allowed, (row, tokens)


def test_the_leak_test_can_fail(model: ModelConfig) -> None:
    """With borders that leave two documents together, the second one sees the first."""
    ids = torch.randint(0, 97, ROWS.shape)
    other = ids.clone()
    other[0, 30:35] = (other[0, 30:35] + 1) % 97
    together = ROWS.clone()
    together[0, 35:] += 30
    before, after = (hidden_states(model, "varlen", tokens, together) for tokens in (ids, other))
    assert (after - before)[0, 35:].abs().max() > 1e-2


@pytest.mark.parametrize(("model_type", "changes"), HEAD_CASES)
def test_varlen_equals_dense_in_hidden_states_and_gradients(model_type: str, changes: dict) -> None:
    """float32: the two sum in other orders, 6e-8 an operation, over 48 keys and four layers: 1e-5 of the whole."""
    if model_type == "llama4" and not chunks_follow_documents():
        changes = {**changes, "attention_chunk_size": 48}
    model = tiny_model(model_type, **changes)
    ids = torch.randint(0, 97, ROWS.shape)
    wanted = torch.randn(*ROWS.shape, 64)
    found = {}
    for path in ("dense", "varlen"):
        hf_model = a_model(model, path)
        options = options_of(model, path, ROWS)
        backbone = family_of(model_type).backbone(hf_model)
        hidden = backbone(input_ids=ids, position_ids=ROWS, use_cache=False, **options).last_hidden_state
        (hidden * wanted).sum().backward()
        found[path] = {"hidden": hidden.detach()} | {
            name: parameter.grad for name, parameter in hf_model.named_parameters() if parameter.grad is not None
        }
    assert found["dense"].keys() == found["varlen"].keys()
    assert len(found["dense"]) > 30
    for name, expected in found["dense"].items():
        error = (found["varlen"][name] - expected).norm() / expected.norm()
        assert error < 1e-5, (name, error)


def test_no_mask_is_made(model: ModelConfig) -> None:
    """No boolean tensor with the square of the row, nor its row-long look for documents, which would wait for a GPU."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Masks(TorchDispatchMode):
        found = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            masks = [leaf for leaf in torch.utils._pytree.tree_leaves(out) if isinstance(leaf, torch.Tensor)]
            self.found += sum(leaf.dtype == torch.bool and leaf.shape[-2:] == (48, 48) for leaf in masks)
            return out

    ids = torch.randint(0, 97, ROWS.shape)
    counts = {}
    for path in ("dense", "varlen"):
        with Masks() as masks:
            hidden_states(model, path, ids, ROWS[:1].expand(3, -1))
        counts[path] = masks.found
    assert counts["dense"] > 0
    assert counts["varlen"] == 0


def test_a_forward_that_forgets_the_documents_is_not_taken_for_one_document() -> None:
    model = tiny_model("llama_v3")
    with pytest.raises(KeyError, match="documents"):
        a_model(model, "varlen").model(input_ids=torch.randint(0, 97, ROWS.shape), position_ids=ROWS, use_cache=False)


@pytest.mark.parametrize("window", [None, 1, 4, 48])
def test_one_layer_against_the_formula(window: int | None) -> None:
    """softmax(Q K^T / sqrt(D)) V in float64 over the tokens each one may see."""
    query, key, value = torch.randn(3, 4, 48, 8), torch.randn(3, 2, 48, 8), torch.randn(3, 2, 48, 8)
    options = {"documents": segments(ROWS, chunk_tokens=None, device=CPU), "scaling": 8**-0.5, "sliding_window": window}
    found, _ = varlen_attention(torch.nn.Module(), query, key, value, None, **options)
    place = torch.arange(48)
    back = place[:, None] - place[None, :]
    document = (ROWS == 0).cumsum(1)
    seen = (document[:, :, None] == document[:, None, :]) & (back >= 0) & (back < (window or 48))
    key, value = (states.repeat_interleave(2, dim=1).double() for states in (key, value))
    scores = (query.double() @ key.transpose(2, 3) * 8**-0.5).masked_fill(~seen[:, None], float("-inf"))
    expected = (scores.softmax(-1) @ value).transpose(1, 2)
    assert found.shape == (3, 48, 4, 8)
    assert (found - expected).abs().max() < 1e-5


def test_the_batch_gets_what_the_way_needs() -> None:
    from types import SimpleNamespace

    batch = SimpleNamespace(position_ids=ROWS)
    assert Attention("dense", 16).segments(batch, CPU) == {}
    assert Attention("varlen", None).segments(batch, CPU).keys() == {"documents"}
    assert Attention("varlen", 16).segments(batch, CPU).keys() == {"documents", "chunks"}


# --- the way a GPU goes, through torch's operation


@pytest.fixture
def kernel_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU goes a GPU's way."""
    varlen_on_cpu.install()
    monkeypatch.setattr(attention_modules, "_one_by_one", attention_modules._by_kernel)


def gradients(model: ModelConfig, positions: torch.Tensor, *, compiler: object = None, mode: str = "none"):  # type: ignore[no-untyped-def]
    """Hidden states and all gradients of the varlen model, for each batch of `positions` [batches, B, T]."""
    hf_model = a_model(model, "varlen")  # which seeds what follows, too
    family = family_of(model.model_type)
    for block in family.blocks(hf_model):
        if mode != "none":
            checkpoint_activations(block, mode)
        if compiler is not None:
            block.forward = torch.compile(block.forward, backend=compiler)
    found = []
    for batch in positions:
        ids = torch.arange(batch.numel()).reshape(batch.shape) * 7 % 97
        options = options_of(model, "varlen", batch)
        hidden = family.backbone(hf_model)(input_ids=ids, position_ids=batch, use_cache=False, **options)
        hf_model.zero_grad()
        # Not its square: the last norm makes that a constant, and gradients of rounding alone.
        (hidden.last_hidden_state * torch.randn(64)).sum().backward()
        found.append(hidden.last_hidden_state.detach())
        found += [p.grad.clone() for p in hf_model.parameters() if p.grad is not None]
    return found


def assert_close(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    """float32 sums in another order: 1e-5 of the whole."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm().clamp(min=1.0)


def test_the_kernel_is_called_for_the_same_numbers(model: ModelConfig, request: pytest.FixtureRequest) -> None:
    """Windows, chunks, scale and grouped heads in the kernel's own terms."""
    one_by_one = gradients(model, ROWS[None])
    request.getfixturevalue("kernel_for_all")
    assert_close(gradients(model, ROWS[None]), one_by_one)


@pytest.mark.usefixtures("kernel_for_all")
@pytest.mark.parametrize("mode", ["none", "selective"])
def test_compiled_blocks_follow_any_number_of_documents(mode: str) -> None:
    """One graph for all layers and batches; a single document in each row, or many."""
    model = tiny_model("mistral")
    whole, halves = torch.arange(48).expand(3, -1), (torch.arange(48) % 24).expand(3, -1)
    many, more = (torch.arange(48) % 5).expand(3, -1), (torch.arange(48) % 17).expand(3, -1)
    positions = torch.stack([whole, halves, ROWS, many, more])
    torch._dynamo.reset()
    compiler = CompileCounterWithBackend("aot_eager")
    found = gradients(model, positions, compiler=compiler, mode=mode)
    assert compiler.frame_count == 1
    assert_close(found, gradients(model, positions))


def graphs_in_bf16_shards(world: World, model_type: str) -> list[int]:
    """How many graphs there are after each batch; on a rank, with the blocks sharded as in a job."""
    torch._dynamo.reset()
    model, compiler = tiny_model(model_type), CompileCounterWithBackend("aot_eager")
    hf_model, family = a_model(model, "varlen"), family_of(model_type)
    blocks = family.blocks(hf_model)
    for block in blocks:
        block.forward = torch.compile(block.forward, backend=compiler)
    root = LanguageModel(
        hf_model, backbone=family.backbone(hf_model), output_weight_owner=hf_model.get_output_embeddings()
    )
    mesh = build_mesh("full", world_size=world.size, hybrid_shard_degree=1, device_type="cpu")
    shard(root, blocks, mesh=mesh, parallel=ParallelConfig(bf16=True), pin_memory=False)
    varlen_on_cpu.install()
    counts = []
    with pytest.MonkeyPatch.context() as patch:  # the rank serves other tests too
        patch.setattr(attention_modules, "_one_by_one", attention_modules._by_kernel)
        for length in (48, 24, 5, 17):
            positions = (torch.arange(48) % length).expand(3, -1)
            root(positions, positions, positions, options_of(model, "varlen", positions)).backward()
            counts.append(compiler.frame_count)
    return counts


def test_compiled_blocks_stay_one_graph_where_fsdp_casts(pools: Callable[[int], RankPool]) -> None:
    """One graph for each kind of block (llama4: chunked and not), though FSDP2 goes over everything they get."""
    assert pools(1).run(graphs_in_bf16_shards, "llama4")[0] == [2] * 4


@pytest.mark.usefixtures("kernel_for_all")
def test_selective_checkpointing_keeps_what_the_kernel_made() -> None:
    """Once per layer, in forward; `full` runs it again in backward."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Calls(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            self.count += func is torch.ops.torch_attn._varlen_attn.default
            return func(*args, **(kwargs or {}))

    counts = {}
    for mode in ("full", "selective"):
        with Calls() as calls:
            gradients(tiny_model("llama_v3"), ROWS[None], mode=mode)
        counts[mode] = calls.count
    assert counts == {"full": 8, "selective": 4}
