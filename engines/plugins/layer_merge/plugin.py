"""The merge of levels as a plugin whose kernel lies in the engine. Annotations are read while it
is registered, so they must not be postponed.

`describe`: y [B, tokens, output_size] in the format of x [B, tokens, levels * hidden_size]; weight
[levels * hidden_size, output_size]. `formats`: all tensors in one. `implement`: the kernel's name,
its PTX, its launch and its scalar, the tokens of all images; raises BuildError where the PTX cannot
be what a plugin may hold (compile.compiled).
"""

from edgevlm.engines.plugins import aot
from edgevlm.engines.plugins.aot import Floats, Ints
from edgevlm.engines.plugins.layer_merge.spec import ROWS, Attributes
from edgevlm.engines.plugins.work import ceil_div

ID = f"{aot.NAMESPACE}::LayerMerge"


def define(sm: int) -> None:
    """Register edgevlm::LayerMerge for cards of compute capability `sm`.

    Lowering adds the attribute `output_size` to the function's own: what is compiled in must not
    depend on a shape.
    """
    import tensorrt.plugin as trtp

    def describe(
        x: trtp.TensorDesc,
        norm_weight: trtp.TensorDesc,
        norm_bias: trtp.TensorDesc,
        scale: trtp.TensorDesc,
        weight: trtp.TensorDesc,
        bias: trtp.TensorDesc,
        levels: Ints,
        hidden_size: Ints,
        epsilon: Floats,
        output_size: Ints,
    ) -> trtp.TensorDesc:
        shape = (x.shape_expr[0], x.shape_expr[1], weight.shape_expr[1])
        return trtp.from_shape_expr(shape, x.dtype)

    def formats(x, norm_weight, norm_bias, scale, weight, bias, outputs):  # type: ignore[no-untyped-def]
        return aot.combinations(trtp, "x norm_weight norm_bias scale weight bias y".split())

    def implement(
        x: trtp.TensorDesc,
        norm_weight: trtp.TensorDesc,
        norm_bias: trtp.TensorDesc,
        scale: trtp.TensorDesc,
        weight: trtp.TensorDesc,
        bias: trtp.TensorDesc,
        levels: Ints,
        hidden_size: Ints,
        epsilon: Floats,
        output_size: Ints,
        outputs: tuple[trtp.TensorDesc],
        tactic: int,
    ) -> tuple[str, str, trtp.KernelLaunchParams, trtp.SymIntExprs]:
        from edgevlm.engines.plugins.layer_merge.kernel import layer_merge

        at = Attributes(
            levels=aot.number(levels),
            hidden_size=aot.number(hidden_size),
            epsilon=float(epsilon[0]),
            outputs=aot.number(output_size),
        )
        dtype = aot.dtype_of(x)
        tokens = x.shape_expr[0] * x.shape_expr[1]
        across = ceil_div(at.outputs, at.columns(dtype))
        programs = trtp.cdiv(tokens, ROWS) * across
        return aot.answer(trtp, layer_merge, at.launch(dtype), dtype, sm, programs, [tokens])

    trtp.register(ID)(describe)
    trtp.autotune(ID)(formats)
    trtp.aot_impl(ID)(implement)
