"""Reading collectives out of compiled programs: forms of replica groups, loops, real programs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dsv3_jax.config import ParallelConfig
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.planning import hlo

SIZES = {"replica": 1, "fsdp": 2, "expert": 4, "tensor": 1, "context": 1}


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("{{0,1},{2,3}}", [[0, 1], [2, 3]]),
        ("{}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("[4,2]<=[8]", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("[4,2]<=[2,4]T(1,0)", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("mesh['a'=2,'b'=4] {'b'}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("mesh['a'=2,'b'=4] {'a'}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
    ],
)
def test_replica_groups(text, groups):
    assert hlo.replica_groups(text, 8).tolist() == groups


def test_a_group_that_divides_an_axis_is_refused():
    with pytest.raises(ValueError, match="divides an axis"):
        hlo.replica_groups("mesh['a'=8] {'a':(2)4}", 8)


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ([[0, 1, 2, 3], [4, 5, 6, 7]], ("expert",)),
        ([[0, 4], [1, 5], [2, 6], [3, 7]], ("fsdp",)),
        ([[0, 1, 2, 3, 4, 5, 6, 7]], ("fsdp", "expert")),
        ([[0], [1]], ()),
    ],
)
def test_axes_of_a_group(groups, axes):
    assert hlo.group_axes(np.array(groups), SIZES) == axes


PROGRAM = """
HloModule jit_f

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%body (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %x = f32[8,4]{1,0} get-tuple-element(%p), index=1
  %ar = f32[8,4]{1,0} all-reduce(%x), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %t = (s32[], f32[8,4]{1,0}) tuple(%i, %ar)
}

%cond (p: (s32[], f32[8,4])) -> pred[] {
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] constant(5)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%cheap (p: f32[8,4]) -> f32[8,4] {
  ROOT %same = f32[8,4]{1,0} copy(%p)
}

%dear (p: f32[8,4]) -> f32[8,4] {
  ROOT %cp = f32[8,4]{1,0} collective-permute(%p), source_target_pairs={{0,4},{4,0}}
}

ENTRY %main (p: f32[8,4], r: bf16[64,16]) -> f32[8,4] {
  %r = bf16[64,16]{1,0} parameter(1)
  %w = (s32[], f32[8,4]{1,0}) while(%init), condition=%cond, body=%body
  %c = f32[8,4]{1,0} conditional(%pred, %p, %p), branch_computations={%cheap, %dear}
  %ag = (f32[4]{0}, f32[8]{0}) all-gather-start(%q), replica_groups=[4,2]<=[2,4]T(1,0)
  %ra = bf16[256,16]{1,0} ragged-all-to-all(%r, %o), replica_groups={{0,1,2,3},{4,5,6,7}}
  ROOT %rs = f32[2,4]{1,0} reduce-scatter(%p), replica_groups={{0,1,2,3},{4,5,6,7}}
}
"""


def test_a_program_is_added_up():
    """Loops by their trips, of a conditional the lighter branch, a start's result once."""
    found = {(c.kind, c.axes): (c.sent, c.calls) for c in hlo.collectives(PROGRAM, SIZES)}
    assert found == {
        ("all-reduce", ("expert",)): (5 * 2 * 128 * 3 // 4, 5),
        ("all-gather", ("fsdp",)): (32 // 2, 1),
        ("ragged-all-to-all", ("expert",)): (64 * 16 * 2 * 3 // 4, 1),
        ("reduce-scatter", ("expert",)): (32 * 3, 1),
    }


def test_a_real_program():
    """A scanned matrix product whose weights are gathered each time, on eight devices."""
    mesh = make_mesh(ParallelConfig(fsdp=2, expert=4))

    def put(shape, *spec):
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)

    x = put((16, 64), ("fsdp", "expert"))
    w = put((3, 64, 64), None, "expert")

    def f(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    with jax.set_mesh(mesh):
        text = jax.jit(f, out_shardings=x.sharding).lower(x, w).compile().as_text()
    gathers = [c for c in hlo.collectives(text, dict(mesh.shape)) if c.kind == "all-gather"]
    assert gathers == [hlo.Collective("all-gather", ("expert",), 3 * 64 * 64 * 4 * 3 // 4, 3)]
