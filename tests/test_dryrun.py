"""launch.dryrun: names of topologies, counting of a program's text, roofline, messages."""

import importlib.util
import json
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from launch import command, dryrun
from point_jax.data.pipeline import batch_shapes, make_batches
from point_jax.geometry.loops import planned
from point_jax.measure import cost, hlo, topology
from point_jax.measure.cost import Collective, Costs, Kernel
from point_jax.measure.dryrun import activation_bytes, make_step, too_much
from point_jax.measure.roofline import collective_seconds, estimate
from point_jax.measure.traced import kept_bytes, product_flops
from point_jax.ops.attention import patch_attention
from tests.small import get_config
from tests.test_benchmark import ONE_LEVEL

# ---- Names of topologies.


@pytest.mark.parametrize(
    ("name", "devices", "domain"),
    [
        ("v5e:4x8", 32, 32),
        ("v5p:4x4x4", 64, 64),
        ("2*v6e:8x8", 128, 64),
        ("tpu7x:2x2x1", 8, 8),  # two devices a chip
        ("v4:2x2x2", 16, 16),
        ("h100:4x8", 32, 8),
        ("cpu:8", 8, 8),
    ],
)
def test_a_name_says_how_many_devices_and_how_many_of_them_are_near(name, devices, domain):
    parsed = topology.parse(name)
    assert (parsed.size, parsed.domain, str(parsed)) == (devices, domain, name)


def test_slices_may_be_said_apart_from_the_name():
    assert topology.parse("v5e:16x16", slices=2) == topology.parse("2*v5e:16x16")


@pytest.mark.parametrize(
    ("name", "slices", "words"),
    [
        ("v5e", 1, "expected v5e:4x8"),
        ("v9:4x4", 1, "no chip 'v9'; known are v4, v5e"),
        ("v5p:4x4", 1, "3 dimension.*v5p:AxBxC"),
        ("h100:32", 1, "HOSTSxGPUS"),
        ("v5e:0x4", 1, "at least 1"),
        ("2*h100:4x8", 1, "only TPUs have slices"),
        ("2*v5e:4x8", 2, "leave one out"),
    ],
)
def test_a_wrong_name_is_told_how_it_should_be(name, slices, words):
    with pytest.raises(ValueError, match=words):
        topology.parse(name, slices)


def test_a_dimension_that_closes_to_no_ring_halves_its_links():
    whole, part = topology.parse("v5e:16x16"), topology.parse("v5e:4x16")
    assert whole.links == 200e9
    assert part.links == topology.parse("v5e:4x8").links * 1.5 == 150e9
    assert topology.parse("v5p:4x4x4").links == 600e9


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is there")
def test_what_is_not_installed_is_named_with_the_command_that_does():
    with pytest.raises(ValueError, match=r"pip install 'point_jax\[tpu\]'"):
        topology.parse("v5e:4x8").devices()


# ---- The text of a program, as TPUs' compiler writes it.

TEXT = """HloModule jit_f, num_partitions=4

%body (arg.1: (s32[], f32[100,48])) -> (s32[], f32[100,48]) {
  %arg.1 = (s32[]{:T(128)}, f32[100,48]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%arg.1), index=0
  %x = f32[100,48]{1,0:T(8,128)} get-tuple-element(%arg.1), index=1
  %w = bf16[48,48]{1,0:T(8,128)(2,1)S(1)} constant({...})
  %conv = f32[100,48]{1,0:T(8,128)} convolution(%x, %w), dim_labels=bf_io->bf, metadata={op_name="jit(f)/attention/while/body/dot_general"}
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)S(6)} add(%i, %one)
  ROOT %out = (s32[]{:T(128)}, f32[100,48]{1,0:T(8,128)}) tuple(%next, %conv)
}

%condition (arg.2: (s32[], f32[100,48])) -> pred[] {
  %arg.2 = (s32[]{:T(128)}, f32[100,48]{1,0:T(8,128)}) parameter(0)
  %i.2 = s32[]{:T(128)} get-tuple-element(%arg.2), index=0
  %end = s32[]{:T(128)} constant(7)
  ROOT %lt = pred[]{:T(512)} compare(%i.2, %end), direction=LT
}

%fused (p0: f32[1000,128], p1: s32[]) -> f32[8,128] {
  %p0 = f32[1000,128]{1,0:T(8,128)} parameter(0)
  %p1 = s32[]{:T(128)S(6)} parameter(1)
  ROOT %cut = f32[8,128]{1,0:T(8,128)} dynamic-slice(%p0, %p1, %p1), dynamic_slice_sizes={8,128}
}

ENTRY %main (a: f32[100,48], b: f32[1000,128], c: s32[]) -> f32[100,48] {
  %a = f32[100,48]{1,0:T(8,128)} parameter(0)
  %b = f32[1000,128]{1,0:T(8,128)} parameter(1)
  %c = s32[]{:T(128)S(6)} parameter(2)
  %zero = s32[]{:T(128)} constant(0)
  %begin = s32[]{:T(128)} copy(%zero)
  %start = (s32[]{:T(128)}, f32[100,48]{1,0:T(8,128)}) tuple(%begin, %a)
  %loop = (s32[]{:T(128)}, f32[100,48]{1,0:T(8,128)}) while(%start), condition=%condition, body=%body, metadata={op_name="jit(f)/attention/while"}
  %unknown = (s32[]{:T(128)}, f32[100,48]{1,0:T(8,128)}) while(%loop), condition=%condition, body=%body, metadata={op_name="jit(f)/transpose(jvp(attention))/transpose(jvp(planned_5))/while"}
  %part = f32[8,128]{1,0:T(8,128)} fusion(%b, %c), kind=kLoop, calls=%fused
  %sum = (f32[8,128]{1,0:T(8,128)}, bf16[10]{0:T(1024)}) all-reduce(%part, %small), replica_groups={{0,1,2,3}}, to_apply=%add
  %small = bf16[10]{0:T(1024)} constant({...})
  %all = f32[32,128]{1,0:T(8,128)} all-gather(%part), replica_groups=[2,2]<=[2,2]T(1,0), dimensions={0}
  ROOT %result = f32[100,48]{1,0:T(8,128)} get-tuple-element(%unknown), index=1
}
"""  # noqa: E501


@pytest.fixture
def costs():
    return cost.count(hlo.parse(TEXT), domain=2)


def test_products_count_as_often_as_their_loops_run(costs):
    assert costs.flops == {"single": (7 + 5) * 2.0 * 100 * 48 * 48}
    assert costs.unknown == []
    assert costs.turns == 5 + 1  # the second loop's


def test_a_part_that_is_fetched_counts_as_the_part():
    """Compilers for TPUs fetch an array onto the chip in pieces, while something else runs."""
    fetch = (
        "  %fetch = ((f32[1000,128]{1,0:T(8,128)}), f32[200,128]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) "
        "slice-start(%b), slice={[0:200], [0:128]}\n"
        "  %copy = (f32[1000,128]{1,0:T(8,128)}, f32[1000,128]{1,0:T(8,128)S(1)}, u32[]{:S(2)}) "
        "copy-start(%there)\n"
    )
    found = cost.count(hlo.parse(TEXT.replace("  ROOT %result", fetch + "  ROOT %result")))
    sizes = {kernel.name: kernel.size for kernel in found.kernels}
    assert (sizes["fetch"], sizes["copy"]) == (200 * 128 * 4, 1000 * 128 * 4)
    assert {kernel.name for kernel in found.kernels if kernel.ahead} == {"fetch", "copy"}


def test_a_fusion_that_runs_beside_others_counts_once_and_for_what_it_reads():
    """As JAX 0.12's programs for GPUs start and await some."""
    beside = (
        "  %begun = ((f32[1000,128]{1,0:T(8,128)}, s32[]), f32[8,128]{1,0:T(8,128)}, u32[]) "
        "fusion-start(%b, %c), kind=kLoop, calls=%fused\n"
        "  %ended = f32[8,128]{1,0:T(8,128)} fusion-done(%begun)\n"
    )
    found = cost.count(hlo.parse(TEXT.replace("  ROOT %result", beside + "  ROOT %result")))
    sizes = {kernel.name: kernel.size for kernel in found.kernels}
    assert sizes["begun"] == sizes["part"] and "ended" not in sizes


def test_a_fusion_that_scatters_counts_what_it_changes():
    """In place, as a loop's body on a GPU."""
    fused = (
        "%scattered (q0: f32[1000,128], q1: s32[8,1], q2: f32[8,128]) -> f32[1000,128] {\n"
        "  %q0 = f32[1000,128]{1,0} parameter(0)\n"
        "  %q1 = s32[8,1]{1,0} parameter(1)\n"
        "  %q2 = f32[8,128]{1,0} parameter(2)\n"
        "  ROOT %set = f32[1000,128]{1,0} scatter(%q0, %q1, %q2), to_apply=%add\n"
        "}\n\n"
    )
    use = (
        "  %rows = s32[8,1]{1,0} copy(%rows.1)\n"
        "  %set.1 = f32[1000,128]{1,0} fusion(%b, %rows, %part), kind=kInput, calls=%scattered\n"
    )
    text = TEXT.replace("ENTRY", fused + "ENTRY").replace("  ROOT %result", use + "  ROOT %result")
    (kernel,) = (k for k in cost.count(hlo.parse(text)).kernels if k.name == "set.1")
    assert kernel.size == 3 * 8 * 128 * 4 + 8 * 4  # old and new values, what is written, where


def test_a_search_between_two_bounds_is_no_counter():
    """What its scope says is what it runs, though its bounds start at constants."""
    text = TEXT.replace("while(%loop)", "while(%start)").replace("constant(7)", "constant(2000000)")
    flops = cost.count(hlo.parse(text)).flops["single"]
    assert flops == (2_000_000 + 5) * 2.0 * 100 * 48 * 48


def test_bytes_are_whole_tiles_in_memory_and_of_a_slice_its_part(costs):
    sizes = {kernel.name: kernel.size for kernel in costs.kernels}
    tiles = 104 * 128 * 4  # 100 x 48 numbers in tiles of 8 x 128
    assert sizes["conv"] == 2 * tiles  # the kernel lies on the chip
    assert sizes["part"] == 2 * 8 * 128 * 4


def test_collectives_tell_what_is_sent_and_how_far(costs):
    assert costs.collectives == [
        Collective("all-reduce", "f32+bf16", 8 * 128 * 4 + 20, group=4, domains=2, times=1),
        Collective("all-gather", "f32", 2 * 8 * 128 * 4, group=2, domains=2, times=1),
    ]


def test_groups_of_devices_are_read_in_all_three_forms():
    groups = cost.replica_groups
    assert groups("replica_groups={{0,1},{2,3}}, x={}") == [(0, 1), (2, 3)]
    assert groups("replica_groups=[2,2]<=[4]") == [(0, 1), (2, 3)]
    assert groups("replica_groups=[2,2]<=[2,2]T(1,0), x") == [(0, 2), (1, 3)]
    assert groups("replica_groups=mesh['data'=4] {'data'}, x={}") == [(0, 1, 2, 3)]
    assert groups("replica_groups=mesh['data'=2,'fsdp'=2] {'fsdp'}, x") == [(0, 1), (2, 3)]
    assert groups("replica_groups=mesh['data'=2,'fsdp'=2] {'data'}, x") == [(0, 2), (1, 3)]
    assert groups("replica_groups=mesh['a'=2,'b'=2] {'a','b'}, x") == [(0, 1, 2, 3)]
    assert groups("replica_groups=mesh['c'=2,'a-b'=2] {'c'}, x") == [(0, 2), (1, 3)]
    with pytest.raises(ValueError, match="not understood: replica_groups=mesh"):
        groups("replica_groups=mesh['a'=4] {'a':(1)2}, x")


def test_a_batch_of_products_that_is_written_as_a_convolution_counts_its_pairs_alone():
    def flops(window, labels, shape):
        text = (
            "ENTRY %m (a: f32[16,64,32], b: f32[16,32,8]) -> f32[1] {\n"
            "  %a = f32[16,64,32]{2,1,0} parameter(0)\n"
            "  %b = f32[16,32,8]{2,1,0} parameter(1)\n"
            f"  ROOT %c = f32[{shape}]{{2,1,0}} convolution(%a, %b), window={{{window}}}, "
            f"dim_labels={labels}\n}}"
        )
        return cost.count(hlo.parse(text)).flops["single"]

    wanted = 2.0 * 16 * 64 * 32 * 8
    batch = "size=16 stride=15 pad=0_0 lhs_dilate=16"
    assert flops(batch, "0bf_0io->0bf", "16,64,8") == wanted
    contracted = 2.0 * 64 * 32 * 8 * 16  # the spatial dimension is summed over
    assert flops("size=16", "0bf_0io->b0f", "64,1,8") == contracted


def test_a_kernel_says_in_its_scope_what_it_multiplies():
    text = (
        "ENTRY %m (n: s32[2], a: bf16[64,48]) -> bf16[64,16] {\n"
        "  %n = s32[2]{0} parameter(0)\n"
        "  %a = bf16[64,48]{1,0} parameter(1)\n"
        '  ROOT %c = bf16[64,16]{1,0} custom-call(%n, %a), custom_call_target="tpu_custom_call", '
        'metadata={op_name="jit(f)/attention/products_4096/pallas_call"}\n}'
    )
    assert cost.count(hlo.parse(text)).flops == {"half": 4096.0}


def test_what_hosts_send_between_slices_is_a_collective():
    def between(kind, slices):
        attributes = (
            "channel_id=8, is_host_transfer=true, frontend_attributes={"
            '_xla_host_transfer_rendezvous="all-reduce.146_0",_xla_megascale_reduce_operation="ADD",'
            f'_xla_megascale_target="{{{slices}}}x{{0:3}}",_xla_megascale_transfer_type="{kind}"}}'
        )
        text = (
            "ENTRY %m (a: f32[100,48]) -> f32[100,48] {\n"
            "  %a = f32[100,48]{1,0:T(8,128)} parameter(0)\n"
            "  %mark = token[] after-all()\n"
            f"  %send = (f32[100,48]{{1,0}}, u32[], token[]) send(%a, %mark), {attributes}\n"
            f"  %recv = (f32[100,48]{{1,0}}, u32[], token[]) recv(%mark), {attributes}\n"
            "  %sent = token[] send-done(%send), channel_id=8\n"
            "  %done = (f32[100,48]{1,0}, token[]) recv-done(%recv), channel_id=7\n"
            "  ROOT %out = f32[100,48]{1,0} get-tuple-element(%done), index=0\n}"
        )
        found = cost.count(hlo.parse(text), 4)
        assert not found.kernels
        return found.collectives

    size = 100 * 48 * 4
    assert between("ALL_REDUCE", "1,2") == [("all-reduce", "f32", size, 2, 2, 1)]
    assert between("ALL_REDUCE", "1:4") == [("all-reduce", "f32", size, 4, 4, 1)]
    assert between("ALL_GATHER", "1,2:3") == [("all-gather", "f32", 3 * size, 3, 3, 1)]
    (one,) = between("ALL_REDUCE", "1,2")
    slices = topology.parse("2*v5e:2x2")
    assert slices.chip is not None
    assert collective_seconds(one, slices) == size / slices.chip.network


def test_a_text_without_a_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.parse("HloModule nothing")


def test_what_is_compiled_here_counts_as_its_trace_does():
    """XLA's own count has the bodies of loops once."""

    def f(w, x, n):
        y = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]
        with planned(3):
            return jax.lax.fori_loop(0, n, lambda i, y: y @ w[0], y)

    arguments = jnp.ones((5, 32, 32)), jnp.ones((64, 32)), 2
    once = 2.0 * 64 * 32 * 32
    compiled = jax.jit(f).lower(*arguments).compile()
    counted = cost.count(hlo.parse(compiled.as_text()))
    assert sum(counted.flops.values()) == (5 + 3) * once
    assert counted.turns == 3 + 1
    assert product_flops(f, *arguments) == (5 + 1) * once  # a trace knows no plan
    xla = compiled.cost_analysis()
    assert xla is not None and xla["flops"] < 3 * once


def test_attention_of_an_image_counts_as_its_two_products():
    qkv = jax.ShapeDtypeStruct((2 * 50, 3, 4, 8), jnp.float32)
    image = jnp.zeros(100, jnp.int32)
    attend = partial(patch_attention, 1, 50)
    found = product_flops(lambda qkv: attend(qkv, image, None, jnp.int32(2)), qkv)
    assert found == 2 * 2.0 * 2 * 50 * 50 * 4 * 8  # images, tokens, tokens, heads, channels


def test_what_a_backward_pass_keeps_is_counted_without_its_arguments():
    def loss(w, x):
        return jnp.sum(jnp.sin(x @ w)), None

    w, x = jnp.ones((8, 4)), jnp.ones((16, 8))
    assert kept_bytes(loss, w, x) == 16 * 4 * 4  # the cosine


# ---- Roofline.


def test_a_kernel_takes_the_longer_of_products_and_memory():
    where = topology.parse("v5e:4x8")
    kernels = [
        Kernel("a", "jit(f)/mlp/dot", {"half": 197e12}, 819e9 / 2, 2),  # a second each, by products
        Kernel("b", "jit(f)/geometry/sort", {}, 819e9, 3),
        Kernel("c", "", {"exact": 197e12}, 0, 1),
    ]
    line = estimate(Costs(kernels), where)
    assert line.parts == {"other": 6.0, "geometry": 3.0, "mlp": 2.0, "collectives": 0.0}
    assert (line.kernels, line.products, line.memory) == pytest.approx((11, 8, 4))


def test_moves_take_the_time_that_products_leave_to_the_memory():
    where = topology.parse("v5e:4x8")
    products = Kernel("a", "jit(f)/mlp/dot", {"half": 3 * 197e12}, 819e9, 1)  # 3 s, 1 s of memory
    reads = Kernel("b", "jit(f)/geometry/sort", {}, 819e9, 1)
    for seconds, more in ((1, 0), (2, 0), (5, 3)):
        moves = Kernel("copy-start", "", {}, 819e9 / 2, 2 * seconds, ahead=True)
        line = estimate(Costs([products, reads, moves]), where)
        assert line.seconds == pytest.approx(4 + more)
        assert line.memory == pytest.approx(2 + seconds)
        assert line.parts.get("moves that nothing hides", 0) == pytest.approx(more)


def test_on_gpus_kernels_take_time_to_start_and_loops_wait_for_the_host():
    where = topology.parse("h100:1x1")
    assert where.chip is not None
    kernels = [Kernel("a", "jit(f)/mlp/add", {}, 1, 500), Kernel("b", "", {}, 3352e9, 1)]
    line = estimate(Costs(kernels, turns=100), where)
    assert line.parts["mlp"] == pytest.approx(500 * where.chip.start)
    assert line.turns == line.parts["waits for the host"] == pytest.approx(100 * where.chip.turn)
    assert line.seconds == pytest.approx(1 + line.parts["mlp"] + line.turns)
    assert estimate(Costs(kernels, turns=100), topology.parse("v5e:1x1")).turns == 0


def test_a_sum_goes_round_twice_and_between_hosts_with_its_share():
    where = topology.parse("h100:4x8")
    assert where.chip is not None
    near = Collective("all-reduce", "f32", 8_000_000, 8, 1, 1)
    assert collective_seconds(near, where) == pytest.approx(2 * 7e6 / 450e9)
    far = Collective("all-reduce", "f32", 8_000_000, 32, 4, 1)
    assert collective_seconds(far, where) == pytest.approx(2 * 7e6 / 450e9 + 2 * 0.75e6 / 50e9)
    gather = far._replace(kind="all-gather")
    assert collective_seconds(gather, where) == pytest.approx(collective_seconds(far, where) / 2)


# ---- Messages.


def test_too_much_memory_is_read_from_xla_s_error():
    message = (
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. "
        "Used 17.91G of 15.75G hbm. Exceeded hbm capacity by 2.16G."
    )
    assert too_much(message) == (17.91 * 2**30, 15.75 * 2**30)
    assert too_much("RESOURCE_EXHAUSTED: ... (17.91G) exceeds available HBM (15.75G)") == (
        17.91 * 2**30,
        15.75 * 2**30,
    )
    assert too_much("INTERNAL: something else") is None


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--topology=v5e:4"], "2 dimension"),
        (["--topology=v5e:4x8", "--json=no/such/folder/x.json"], "no folder"),
        (["--topology=v5e:4x8", "--json=tests"], "is a folder"),
        (["--topology=v5e:4x8", "--slices=0"], "--slices=0: expected 1 or more"),
        (["--topology=v5e:4x8", "--wrong=1"], "not a flag"),
        (["--topology=v5e:4x8", "--topology=v4:2x2x1"], "--topology is given twice"),
        (["--topology=cpu:100000"], "1024 devices of this machine at most"),
        (
            ["--topology=cpu:1", "--config.network.remat_levels=('all','no')"],
            "network.remat_levels",
        ),
        (["--topology=cpu:1", "--config.network.remat_levels=('all',)"], "1 words for 2 levels"),
        ([], "--topology"),
    ],
)
def test_a_wrong_command_line_ends_in_one_line(flags, words, capsys):
    argv = ["dryrun", "--config=tests/small.py", *flags]
    assert command.run(dryrun.main, argv, dryrun.__doc__) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and words in error and error.count("\n") == 1


def test_shapes_of_a_batch_are_those_that_are_shipped():
    data = get_config().data
    batch = next(make_batches(data, 0, 2))
    assert batch_shapes(data, 2) == {name: (x.shape, x.dtype) for name, x in batch.items()}


def test_remat_says_level_by_level_what_the_backward_pass_keeps():
    config, kept = get_config(), []
    for words in ((), ("none", "cheap"), ("cheap", "cheap"), ("all", "cheap"), ("all", "all")):
        config.network.remat_levels = words
        step = make_step(dryrun.outlined(config), config, topology.parse("cpu:1", 1))
        kept.append(activation_bytes(step))
    assert kept == sorted(kept, reverse=True) and len(set(kept)) == len(kept), kept


@pytest.mark.devices(2)
@pytest.mark.usefixtures("quick_compilation")
def test_a_step_is_planned_for_virtual_devices(tmp_path, capsys):
    """The whole command, on devices that any machine has."""
    file = tmp_path / "plan.json"
    argv = ["dryrun", "--config=tests/small.py", "--topology=cpu:2", "--draws=1", f"--json={file}"]
    assert command.run(dryrun.main, [*argv, *ONE_LEVEL], dryrun.__doc__) == 0
    plan = json.loads(file.read_text())
    assert "cpu:2: 2 devices, 8 scenes a step, 4 a device" in capsys.readouterr().out
    memory = plan["memory"]
    assert memory["optimizer"] == 2 * memory["gradients"] == 2 * memory["student"] > 0
    assert memory["needed"] >= memory["student"] + memory["teacher"] + memory["optimizer"]
    assert memory["outputs"] < memory["student"] / 4  # the state is donated: what is new is metrics
    assert plan["roofline"] is None and memory["fits"]
    # One reduction of the gradient: it is the only large sum.
    sums = [c for c in plan["collectives"] if c["kind"] == "all-reduce"]
    assert sum(c["bytes"] for c in sums) == pytest.approx(memory["gradients"], rel=0.2)
    assert plan["flop_done"] * 2 > plan["flop_needed"] > 0
    assert len(plan["rows_full"]) == 1 and 0 < plan["rows_full"][0] <= 1


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_devices_of_tpus_are_described_without_any():
    assert len(topology.parse("v5e:4x8").devices()) == 32
    with pytest.raises(ValueError, match="no such topology"):
        topology.parse("v5e:3x7").devices()
