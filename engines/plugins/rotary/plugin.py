"""The rotation of queries and keys as a plugin whose kernel lies in the engine. Annotations are
read while it is registered, so they must not be postponed."""

from edgevlm.engines.plugins import aot
from edgevlm.engines.plugins.aot import Ints
from edgevlm.engines.plugins.rotary.spec import Attributes

ID = f"{aot.NAMESPACE}::RotateHeads"


def define(sm: int) -> None:
    """Register edgevlm::RotateHeads for cards of compute capability `sm`."""
    import tensorrt.plugin as trtp

    def describe(
        q: trtp.TensorDesc,
        k: trtp.TensorDesc,
        angles: trtp.TensorDesc,
        num_heads: Ints,
        head_dim: Ints,
    ) -> tuple[trtp.TensorDesc, trtp.TensorDesc]:
        """q_rotated, k_rotated [B, num_heads, tokens, head_dim] in the formats of q and k [B,
        tokens, num_heads * head_dim]; angles [tokens, head_dim / 2] in radians.
        """
        heads, width = aot.number(num_heads), aot.number(head_dim)
        shape = (q.shape_expr[0], heads, q.shape_expr[1], width)
        turned = [trtp.from_shape_expr(shape, x.dtype) for x in (q, k)]
        return turned[0], turned[1]

    def formats(q, k, angles, outputs):  # type: ignore[no-untyped-def]
        """All tensors in one format, but the angles always in float32."""
        return aot.combinations(trtp, "q k angles q_rotated k_rotated".split(), ["angles"])

    def implement(
        q: trtp.TensorDesc,
        k: trtp.TensorDesc,
        angles: trtp.TensorDesc,
        num_heads: Ints,
        head_dim: Ints,
        outputs: tuple[trtp.TensorDesc],
        tactic: int,
    ) -> tuple[str, str, trtp.KernelLaunchParams, trtp.SymIntExprs]:
        """The kernel's name, its PTX for sm_`sm`, its launch, and its scalar: tokens.

        Raises BuildError where PTX cannot be what a plugin may hold (compile.compiled).
        """
        from edgevlm.engines.plugins.rotary.kernel import rotary

        at, dtype = Attributes(aot.number(num_heads), aot.number(head_dim)), aot.dtype_of(q)
        tokens = q.shape_expr[1]
        blocks = q.shape_expr[0] * trtp.cdiv(tokens, at.each())
        programs = blocks * (at.num_heads // at.heads_each())
        return aot.answer(trtp, rotary, at.launch(dtype), dtype, sm, programs, [tokens])

    trtp.register(ID)(describe)
    trtp.autotune(ID)(formats)
    trtp.aot_impl(ID)(implement)
