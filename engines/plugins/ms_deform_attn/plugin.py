"""Deformable attention as a plugin whose kernel lies in the engine. Annotations are read while it
is registered, so they must not be postponed."""

from edgevlm.engines.plugins import aot
from edgevlm.engines.plugins.aot import Ints
from edgevlm.engines.plugins.ms_deform_attn.spec import Attributes

ID = f"{aot.NAMESPACE}::MSDeformAttn"


def define(sm: int) -> None:
    """Register edgevlm::MSDeformAttn for cards of compute capability `sm`."""
    import tensorrt.plugin as trtp

    def describe(
        value: trtp.TensorDesc,
        offsets: trtp.TensorDesc,
        scores: trtp.TensorDesc,
        reference: trtp.TensorDesc,
        num_heads: Ints,
        num_points: Ints,
        head_dim: Ints,
        levels: Ints,
        height: Ints,
        width: Ints,
    ) -> trtp.TensorDesc:
        """y [B, queries, num_heads * head_dim] in the format of value [B, cells, num_heads *
        head_dim]; offsets [B, queries, num_heads * levels * num_points * 2] in cells.
        """
        shape = (offsets.shape_expr[0], offsets.shape_expr[1], value.shape_expr[2])
        return trtp.from_shape_expr(shape, value.dtype)

    def formats(value, offsets, scores, reference, outputs):  # type: ignore[no-untyped-def]
        """All tensors in one format, but the reference points always in float32."""
        names = ("value", "offsets", "scores", "reference", "y")
        return aot.combinations(trtp, names, ["reference"])

    def implement(
        value: trtp.TensorDesc,
        offsets: trtp.TensorDesc,
        scores: trtp.TensorDesc,
        reference: trtp.TensorDesc,
        num_heads: Ints,
        num_points: Ints,
        head_dim: Ints,
        levels: Ints,
        height: Ints,
        width: Ints,
        outputs: tuple[trtp.TensorDesc],
        tactic: int,
    ) -> tuple[str, str, trtp.KernelLaunchParams, trtp.SymIntExprs]:
        """The kernel's name, its PTX for sm_`sm`, its launch, and its scalar: queries.

        Raises BuildError where PTX cannot be what a plugin may hold (compile.compiled).
        """
        from edgevlm.engines.plugins.ms_deform_attn.kernel import ms_deform_attn

        numbers = (num_heads, num_points, head_dim, levels, height, width)
        at = Attributes(*map(aot.number, numbers))
        dtype = aot.dtype_of(value)
        batch, queries = offsets.shape_expr[0], offsets.shape_expr[1]
        programs = batch * trtp.cdiv(queries, at.each(dtype)) * at.num_heads
        return aot.answer(trtp, ms_deform_attn, at.launch(dtype), dtype, sm, programs, [queries])

    trtp.register(ID)(describe)
    trtp.autotune(ID)(formats)
    trtp.aot_impl(ID)(implement)
