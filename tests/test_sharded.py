"""More than one process, on gloo: FSDP2's DTensors and DDP equal one process. A world runs all its checks at once."""

import os
import warnings
from itertools import product

import pytest
import torch
import torch.distributed as dist
from engines import ENGINES, use
from problems import factors, gradients_of_w, random_matrix, regauged, relative, w
from torch import nn
from worlds import assert_passed, checks_of, outcomes

from lora_rite import PUBLISHED, LoRARite
from lora_rite.plan.plan import Limits

#: (r, n, m), most of which 2 and 4 processes cannot share evenly; of the last, one of 4 has no part of the rank.
SHAPES = [(4, 18, 13), (8, 12, 20), (3, 7, 5), (3, 7, 5)]


def mesh_of(size):
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (size,))


class Pair(nn.Module):
    def __init__(self, a, b):
        super().__init__()
        self.lora_A, self.lora_B = nn.Parameter(a.clone()), nn.Parameter(b.clone())


class Pairs(nn.Module):
    def __init__(self, pairs):
        super().__init__()
        self.pairs = nn.ModuleList(Pair(*pair) for pair in pairs)

    def forward(self):
        return

    def __iter__(self):
        return iter(self.pairs)


def start(dtype, size=None, zero_b=True, adamw=False, **options):
    """The pairs and the optimizer; with ``size``, sharded as fully_shard does it."""
    from torch.distributed.fsdp import fully_shard

    pairs = [factors(*shape, zero_b=zero_b, seed=i, dtype=dtype) for i, shape in enumerate(SHAPES)]
    model = Pairs(pairs)
    if adamw:
        model.bias = nn.Parameter(torch.ones(6, dtype=dtype))
        options["adamw_lr"] = 0.01
    if size is not None:
        fully_shard(model, mesh=mesh_of(size))
    return model, LoRARite(model.named_parameters(), lr=0.02, **options)


def full(t):
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def laid_out_as(p, t):
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(t, p.device_mesh, p.placements) if hasattr(p, "device_mesh") else t


def advance(model, optimizer, steps, first=0, rank_of_gradient=None, bad=None):
    """Steps with the same gradients of W in every process, each of which gives its own part."""
    for t in range(first, first + steps):
        for i, pair in enumerate(model):
            a, b = full(pair.lora_A).detach(), full(pair.lora_B).detach()
            g = gradients_of_w(1, len(b), a.shape[1], rank_of_gradient, t * 10 + i)[0]
            for p, gradient in ((pair.lora_A, b.mT @ g.to(b.dtype)), (pair.lora_B, g.to(a.dtype) @ a.mT)):
                p.grad = laid_out_as(p, gradient) if p.requires_grad else None
        if (bias := getattr(model, "bias", None)) is not None:
            bias.grad = laid_out_as(bias, torch.full(bias.shape, 0.1 * (t % 3), dtype=bias.dtype))
        if bad is not None:
            bad(model)
        optimizer.step()
    return [w((full(pair.lora_A), full(pair.lora_B))) for pair in model]


def local_values(model, optimizer):
    local = lambda t: (t.to_local() if hasattr(t, "to_local") else t).detach().clone()
    params = list(model.parameters())
    return [local(p) for p in params] + [local(t) for p in params for t in optimizer.state[p].values()]


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def agree(value):
    """Whether all processes have bitwise the same tensor."""
    everyone = [torch.empty_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, value.contiguous())
    return all(torch.equal(other, value) for other in everyone)


# ------------------------------------------------------------------------------------------------------------ checks

OPTIONS = {
    "ours": {},
    "published": PUBLISHED,
    "all": {"weight_decay": 0.1, "update_capping": 0.3, "balance_param": True, "apply_escape": True},
    "capturable": {"capturable": True},
}


def check_fsdp2_equals_one_process(size, folder):
    """W after 50 steps with full-rank gradients; fewer where an option is all that is new."""
    for name, dtype, steps, tolerance in (
        ("ours", torch.float64, 50, 1e-10), ("ours", torch.float32, 50, 1e-6), ("published", torch.float64, 10, 1e-10),
        ("all", torch.float64, 10, 1e-10), ("capturable", torch.float64, 4, 1e-10),
    ):  # fmt: skip
        single, sharded = (start(dtype, s, zero_b=False, **OPTIONS[name]) for s in (None, size))
        for expected, got in zip(advance(*single, steps), advance(*sharded, steps), strict=True):
            assert relative(got, expected) < tolerance, (name, dtype, relative(got, expected))
        report = sharded[1].report()
        assert report["pairs_preconditioned"] == len(SHAPES)
        assert report["update_norm"] == pytest.approx(single[1].report()["update_norm"], rel=1e-3)


def check_fsdp2_equals_one_process_where_factors_are_not_stacked(size, folder):
    with pytest.MonkeyPatch.context() as patch:
        use(patch, ENGINES["as_they_lie"])
        check_fsdp2_equals_one_process(size, folder)


def check_large_factors_that_are_cut_unevenly(size, folder):
    """Shares on both sides of the limit, and a B whose Gram matrix must be taken from a product: all processes go
    the same way, which one that is."""
    from torch.distributed.fsdp import fully_shard

    r = 16
    for more, skew in product((-1, 1), (0, 4)):
        rows, scale = Limits().direct_elements // r * size + more, torch.logspace(0, -skew, r)
        results = []
        for sharded in (False, True):
            model = Pairs([(a, b * scale) for a, b in [factors(r, rows, rows, dtype=torch.float32)]])
            if sharded:
                fully_shard(model, mesh=mesh_of(size))
            results += advance(model, LoRARite(model.named_parameters(), lr=0.02), 3)
        assert relative(results[1], results[0]) < 1e-5


def check_fsdp2_from_zero_with_low_rank_gradients_and_adamw(size, folder):
    single, sharded = (start(torch.float64, s, adamw=True) for s in (None, size))
    runs = [advance(*run, 20, rank_of_gradient=2) for run in (single, sharded)]
    for expected, got in zip(*runs, strict=True):
        assert relative(got, expected) < 1e-8
    assert relative(full(sharded[0].bias), single[0].bias) < 1e-12


def start_one_sided(size):
    """A frozen in the first pair, B in the second."""
    from torch.distributed.fsdp import fully_shard

    model = Pairs([factors(*SHAPES[i], zero_b=False, seed=i) for i in (0, 1)])
    model.pairs[0].lora_A.requires_grad_(False)
    model.pairs[1].lora_B.requires_grad_(False)
    if size is not None:
        fully_shard(model, mesh=mesh_of(size))
    return model, LoRARite(model.named_parameters(), lr=0.02)


def check_one_factor_frozen(size, folder):
    """Equal to one process; distributed checkpoints, which restore no state of frozen parameters, go on: bitwise where
    the world is the same."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    single, sharded = (start_one_sided(s) for s in (None, size))
    for expected, got in zip(advance(*single, 10), advance(*sharded, 10), strict=True):
        assert relative(got, expected) < 1e-10
    assert sharded[1].report()["pairs_preconditioned"] == 2
    weights, state = get_state_dict(*sharded)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=os.path.join(folder, f"one_sided_{size}"))
    results = advance(*sharded, 5, first=10)
    for saved_by in (1, 2, 4):
        path = os.path.join(folder, f"one_sided_{saved_by}")
        if not os.path.exists(path):
            continue
        other = start_one_sided(size)
        weights, state = get_state_dict(*other)
        loaded = {"model": weights, "optimizer": state}
        dcp.load(loaded, checkpoint_id=path)
        set_state_dict(*other, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            got = advance(*other, 5, first=10)
        for one, expected in zip(got, results, strict=True):
            assert torch.equal(one, expected) if saved_by == size else relative(one, expected) < 1e-10


def check_invariance_of_sharded_pairs(size, folder):
    results = []
    for other in (False, True):
        model, optimizer = start(torch.float64, size, zero_b=False)
        with torch.no_grad():
            for i, pair in enumerate(model):
                if other:
                    from torch.distributed.tensor import distribute_tensor

                    k = random_matrix(SHAPES[i][0], 100, seed=i)
                    moved = regauged(full(pair.lora_A), full(pair.lora_B), k)
                    for p, value in zip((pair.lora_A, pair.lora_B), moved, strict=True):
                        p.copy_(distribute_tensor(value, p.device_mesh, p.placements))
        results.append(advance(model, optimizer, 10))
    for one, two in zip(*results, strict=True):
        assert relative(two, one) < 1e-8


def check_bfloat16_rounds_alike(size, folder):
    """The noise belongs to elements, whatever process holds them: equal but for the order of sums."""
    single, sharded = (start(torch.bfloat16, s, zero_b=False) for s in (None, size))
    for expected, got in zip(advance(*single, 10), advance(*sharded, 10), strict=True):
        assert relative(got, expected) < 2e-2
    for p, q in zip(sharded[0].parameters(), single[0].parameters(), strict=True):
        assert (full(p) == q).double().mean() > 0.9


def check_first_moments_in_bfloat16(size, folder):
    """Equal to one process but for the noise, whose draw depends on the first basis, that sums in another order turn.
    From a checkpoint on, the basis is the same, and then the noise is so too, on each element, whatever process holds
    it (in float64: other noise would change W by 1e-4 in two steps): bitwise in the same world. And converted where the
    other run keeps float64."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    option = {"first_moment_dtype": "bfloat16"}
    single, sharded = (start(torch.float64, s, zero_b=False, **option) for s in (None, size))
    for expected, got in zip(advance(*single, 10), advance(*sharded, 10), strict=True):
        assert relative(got, expected) < 8e-3
    assert {state["first_moment"].to_local().dtype for state in sharded[1].state.values()} == {torch.bfloat16}
    weights, state = get_state_dict(*sharded)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=os.path.join(folder, f"bfloat16_{size}"))
    results = advance(*sharded, 5, first=10)
    if dist.get_rank() == 0:
        torch.save(results, os.path.join(folder, f"bfloat16_results_{size}.pt"))
    dist.barrier()
    for saved_by, options in product((1, 2, 4), (option, {})):
        path = os.path.join(folder, f"bfloat16_{saved_by}")
        if not os.path.exists(path):
            continue
        other = start(torch.float64, size, **options)
        weights, state = get_state_dict(*other)
        loaded = {"model": weights, "optimizer": state}
        dcp.load(loaded, checkpoint_id=path)
        set_state_dict(*other, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
        expected = torch.load(os.path.join(folder, f"bfloat16_results_{saved_by}.pt"), weights_only=True)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            got = advance(*other, 5, first=10)
        for one, two in zip(got, expected, strict=True):
            bitwise = options and saved_by == size
            assert torch.equal(one, two) if bitwise else relative(one, two) < (1e-9 if options else 8e-3)
        kept = {state["first_moment"].dtype for state in other[1].state.values()}
        assert kept == {torch.bfloat16 if options else torch.float64}


def check_bfloat16_parameters_of_adamw(size, folder):
    """Bitwise equal to one process: matrices, of which each process has rows or nothing, and vectors."""
    from torch.distributed.fsdp import fully_shard

    def run(size):
        model = Pairs([factors(*SHAPES[0], zero_b=False, dtype=torch.bfloat16)])
        model.head = nn.Parameter(torch.linspace(0.5, 2, 15, dtype=torch.bfloat16).view(3, 5))
        model.bias = nn.Parameter(torch.ones(6, dtype=torch.bfloat16))
        if size is not None:
            fully_shard(model, mesh=mesh_of(size))
        optimizer = LoRARite(model.named_parameters(), lr=0.02, adamw_lr=1e-3)
        for t in range(6):
            model.head.grad = laid_out_as(model.head, torch.linspace(-1, 1, 15, dtype=torch.bfloat16).view(3, 5))
            advance(model, optimizer, 1, first=t)
        return full(model.head), full(model.bias)

    for got, expected in zip(run(size), run(None), strict=True):
        assert torch.equal(got, expected)
    assert not torch.equal(got, torch.ones_like(got))


def check_factors_above_each_other_are_refused(size, folder):
    from torch.distributed.fsdp import fully_shard

    model = Pairs([(torch.ones(4, 9), torch.ones(8, 2))])
    group = lambda: {"params": list(model.named_parameters()), "kind": "lora", "blocks": 2}
    optimizer = LoRARite([group()])
    fully_shard(model, mesh=mesh_of(size))
    with pytest.raises(ValueError, match=r"lora_B holds 2 factors one above the other"):
        LoRARite([group()])
    optimizer.param_groups[0]["params"] = list(model.parameters())  # (as accelerate does it)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=r"lora_B holds 2 factors one above the other"):
        optimizer.step()


def check_state_is_shared_out(size, folder):
    model, optimizer = start(torch.float32, size)
    advance(model, optimizer, 1)
    tall = sum(s[k].to_local().numel() for s in optimizer.state.values() for k in ("first_moment", "row_moment"))
    total = torch.tensor(tall)
    dist.all_reduce(total)
    assert total == sum((m + n) * (r + 1) for r, n, m in SHAPES)
    assert tall <= sum((-(-m // size) + -(-n // size)) * (r + 1) for r, n, m in SHAPES)


def check_all_processes_skip_together(size, folder):
    for capturable in (False, True):
        model, optimizer = start(torch.float64, size, capturable=capturable)
        advance(model, optimizer, 3)
        before = local_values(model, optimizer)

        def bad(model):
            if dist.get_rank() == size - 1:
                model.pairs[0].lora_B.grad.to_local()[0, 0] = torch.nan

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            advance(model, optimizer, 1, first=3, bad=bad)
            assert optimizer.report()["skipped"] == 1
        assert any("pairs.0.lora_B" in str(warning.message) for warning in caught)
        assert equal(local_values(model, optimizer), before)
        advance(model, optimizer, 1, first=3)
        assert not equal(local_values(model, optimizer), before)


def check_initialising_step_of_checkpoints_changes_nothing(size, folder):
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model, optimizer = start(torch.float32, size, zero_b=False)
    before = [p.to_local().clone() for p in model.parameters()]
    get_optimizer_state_dict(model, optimizer)
    assert equal([p.to_local() for p in model.parameters()], before)


def check_checkpoint_is_saved(size, folder):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    model, optimizer = start(torch.float64, size, zero_b=False)
    advance(model, optimizer, 5)
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=os.path.join(folder, f"saved_by_{size}"))
    results = advance(model, optimizer, 5, first=5)
    if dist.get_rank() == 0:
        torch.save(results, os.path.join(folder, f"results_{size}.pt"))


def check_checkpoints_of_other_worlds_go_on(size, folder):
    """Saved on 4, loaded on 2 and on 1; bitwise where the world is the same."""
    for saved_by in (1, 2, 4):
        path = os.path.join(folder, f"saved_by_{saved_by}")
        if not os.path.exists(path):
            continue
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

        model, optimizer = start(torch.float64, size, zero_b=False)
        weights, state = get_state_dict(model, optimizer)
        loaded = {"model": weights, "optimizer": state}
        dcp.load(loaded, checkpoint_id=path)
        set_state_dict(model, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
        expected = torch.load(os.path.join(folder, f"results_{saved_by}.pt"), weights_only=True)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # nothing looks like a change from outside
            got = advance(model, optimizer, 5, first=5)
        for one, other in zip(got, expected, strict=True):
            assert torch.equal(one, other) if saved_by == size else relative(one, other) < 1e-10


def check_offload_to_the_cpu(size, folder):
    """FSDP2's CPUOffloadPolicy, through forward and backward passes: bitwise the run without it. On a mesh of GPUs the
    factors that are offloaded go through a real all-to-all (on one of CPUs torch makes it of an all-gather), which
    gloo has too; without gloo, an error that says how to have it."""
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.pair = Pair(*factors(4, 18, 13, zero_b=True, dtype=torch.float32))

        def forward(self, x):
            return x @ self.pair.lora_A.mT @ self.pair.lora_B.mT - x[:, :13]

    def run(**options):
        model, generator = Model(), torch.Generator().manual_seed(1)
        fully_shard(model, mesh=mesh_of(size), **options)
        optimizer = LoRARite(model.named_parameters(), lr=0.01, first_moment_dtype="bfloat16")
        for x in torch.randn(6, 8, 18, generator=generator):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        assert optimizer.report()["pairs_preconditioned"] == 1
        assert {t.device.type for state in optimizer.state.values() for t in state.values()} == {"cpu"}
        return full(model.pair.lora_A).detach(), full(model.pair.lora_B).detach()

    def all_to_all(shard, gather_dim, shard_dim, mesh, mesh_dim):
        group = mesh.get_group(mesh_dim).group_name
        exchanged.append(group)
        return torch.ops._dtensor.shard_dim_alltoall(shard, gather_dim, shard_dim, group)

    exchanged, policy = [], CPUOffloadPolicy(pin_memory=False)
    expected = run()
    assert equal(run(offload_policy=policy), expected)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.distributed.tensor.placement_types.shard_dim_alltoall", all_to_all)
        assert equal(run(offload_policy=policy), expected)
        assert exchanged or size == 1
        patch.setattr(dist, "get_backend_config", lambda group: "cuda:nccl")
        with pytest.raises(ValueError, match=r'group \(cuda:nccl\) has no backend: call .*"cpu:gloo,cuda:nccl"'):
            run(offload_policy=policy)


def check_other_placements_are_refused_by_name(size, folder):
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = mesh_of(size)
    a, b = factors(4, 8, 8)
    for placement in (Replicate(), Shard(0)):
        pair = [nn.Parameter(distribute_tensor(p, mesh, [placement])) for p in (a, b)]
        if placement.is_shard():
            LoRARite(pair)
            with pytest.raises(ValueError, match="same mesh"):
                LoRARite([pair[0], nn.Parameter(b)])
        else:
            with pytest.raises(ValueError, match=r"parameter 0 is a DTensor with placements.*FSDP2"):
                LoRARite(pair)
    model, optimizer = start(torch.float32)
    advance(model, optimizer, 1)
    whole = model.pairs[0].lora_A
    whole.grad = None
    state = optimizer.state.pop(whole)
    sharded = nn.Parameter(distribute_tensor(whole.detach(), mesh, [Shard(0)]))
    optimizer.param_groups[0]["params"][0] = sharded
    optimizer.state[sharded] = state
    sharded.grad = sharded.detach()
    with pytest.raises(ValueError, match="same mesh"):
        optimizer.step()


def check_ddp_equals_one_process_on_the_joined_batch(size, folder):
    from torch.nn.parallel import DistributedDataParallel

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            generator = torch.Generator().manual_seed(0)
            self.weight = nn.Parameter(torch.randn(12, 10, generator=generator), requires_grad=False)
            self.pair = Pair(*factors(4, 10, 12, zero_b=True, dtype=torch.float32))

        def forward(self, x):
            return x @ self.weight.mT + x @ self.pair.lora_A.mT @ self.pair.lora_B.mT

    generator = torch.Generator().manual_seed(1)
    batches = torch.randn(20, 8 * size, 10, generator=generator)
    plain, wrapped = Model(), DistributedDataParallel(Model())
    for model, part in ((plain, slice(None)), (wrapped, slice(dist.get_rank() * 8, dist.get_rank() * 8 + 8))):
        optimizer = LoRARite([(k, p) for k, p in model.named_parameters() if p.requires_grad], lr=0.01)
        for x in batches:
            optimizer.zero_grad()
            model(x[part]).square().mean().backward()
            optimizer.step()
        assert optimizer.report()["pairs_preconditioned"] == 1
    for p, q in zip(plain.parameters(), wrapped.parameters(), strict=True):
        assert agree(q.detach())
        assert relative(q.detach(), p.detach()) < 1e-4


CHECKS = checks_of(globals())


@pytest.fixture(scope="module", params=[(2, 1), pytest.param((4, 2, 1), marks=pytest.mark.slow)], ids=["2", "4"])
def outcome(request):
    """What each check printed on failing. The largest number comes first: the others load its checkpoint."""
    yield from outcomes(__name__, request.param)


@pytest.mark.parametrize("name", CHECKS)
def test_in_several_processes(name, outcome):
    """D1 to D5."""
    assert_passed(name, outcome)
