"""Transformer Engine's names as far as Megatron's bf16 layer specs use them, in plain torch.

For a process that imports megatron-core afterwards: its own wrappers of these modules then run on a
CPU. What the modules keep for their backward, and what they queue, is as in Transformer Engine: a
view of a norm's input, an input of a linear layer, and of a fused one the normalised input.
"""

import contextlib
import math
import queue
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn


class _Product(torch.autograd.Function):
    """x times the weights, one for each part of its tokens; runs backward once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, store: Any, splits: list[int], *weights: Tensor) -> Tensor:
        ctx.save_for_backward(x, *weights)
        ctx.store, ctx.splits = store, splits
        parts = x.flatten(0, -2).split(splits)
        product = torch.cat([a @ w.t() for a, w in zip(parts, weights, strict=True)])
        return product.view(*x.shape[:-1], weights[0].shape[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, *weights = ctx.saved_tensors
        splits, ctx.splits = ctx.splits, None
        parts = grad.flatten(0, -2).split(splits)
        dx = torch.cat([g @ w for g, w in zip(parts, weights, strict=True)]).view(x.shape)

        def weight_gradients(x: Tensor, grad: Tensor) -> list[Tensor]:
            pairs = zip(x.split(splits), grad.split(splits), strict=True)
            return [g.t() @ a for a, g in pairs]

        operands = [x.flatten(0, -2), grad.flatten(0, -2)]
        if ctx.store.context is None:
            return dx, None, None, *weight_gradients(*operands)
        ctx.store.context.put([operands, weight_gradients])
        # GroupedLinear hands autograd the memory into which backward_dw will write, as it is.
        unwritten = [torch.full_like(w, math.nan) if ctx.store.grouped else None for w in weights]
        return dx, None, None, *unwritten


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x.view(-1, x.shape[-1]), weight)
        ctx.eps = eps
        return nn.functional.rms_norm(x, weight.shape, weight, eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        with torch.enable_grad():
            x, weight = (tensor.detach().requires_grad_() for tensor in ctx.saved_tensors)
            y = nn.functional.rms_norm(x, weight.shape, weight, ctx.eps)
        dx, dw = torch.autograd.grad(y, (x, weight), grad.reshape(x.shape))
        return dx.view(grad.shape), dw, None


class _Store:
    def __init__(self, delay: bool, grouped: bool) -> None:
        self.context: Any = queue.Queue() if delay else None
        self.grouped = grouped


class _Base(nn.Module):
    def __init__(self, shape: tuple[int, int], count: int, **options: Any) -> None:
        super().__init__()
        assert not options["bias"]
        delay = options.get("delay_wgrad_compute", False)
        self.wgrad_store, self.use_bias = _Store(delay, grouped=count > 0), False
        self.wgrad_accumulation_and_reduce_hooks: list[Any] = []
        self.in_features, self.out_features = shape[1], shape[0]
        self.names = [f"weight{i}" for i in range(count)] if count else ["weight"]
        for name in self.names:
            weight = nn.Parameter(torch.empty(shape, dtype=options["params_dtype"]))
            options["init_method"](weight)
            if delay:
                weight.skip_backward_post_hook = True  # type: ignore[attr-defined]
            setattr(self, name, weight)

    def _product(self, x: Tensor, splits: list[int]) -> Tensor:
        weights = [getattr(self, name) for name in self.names]
        return _Product.apply(x, self.wgrad_store, splits, *weights)

    def register_wgrad_accumulation_and_reduce_hooks(self, hook: Any) -> None:
        self.wgrad_accumulation_and_reduce_hooks.append(hook)

    def need_backward_dw(self) -> bool:
        return self.wgrad_store.context is not None

    def backward_dw(self) -> None:
        if not self.need_backward_dw():
            return
        operands, function = self.wgrad_store.context.get(block=False)
        for name, gradient in zip(self.names, function(*operands), strict=True):
            getattr(self, name).grad = gradient
        for hook in self.wgrad_accumulation_and_reduce_hooks:
            hook()


class Linear(_Base):
    def __init__(self, in_features: int, out_features: int, **options: Any) -> None:
        super().__init__((out_features, in_features), 0, **options)
        self.parallel_mode = options.get("parallel_mode")

    def forward(self, x: Tensor, is_first_microbatch: bool | None = None) -> Tensor:
        return self._product(x, [math.prod(x.shape[:-1])])


class LayerNormLinear(Linear):
    def __init__(self, in_features: int, out_features: int, *, eps: float, **options: Any) -> None:
        super().__init__(in_features, out_features, **options)
        self.eps = eps
        dtype = options["params_dtype"]
        self.layer_norm_weight = nn.Parameter(torch.ones(in_features, dtype=dtype))

    def forward(self, x: Tensor, is_first_microbatch: bool | None = None) -> Tensor:
        return super().forward(_Norm.apply(x, self.layer_norm_weight, self.eps))


class GroupedLinear(_Base):
    def __init__(self, num_gemms: int, in_features: int, out_features: int, **options: Any) -> None:
        super().__init__((out_features, in_features), num_gemms, **options)
        self.num_gemms = num_gemms

    def forward(self, x: Tensor, m_splits: Any, is_first_microbatch: bool | None = None) -> Tensor:
        return self._product(x, [int(size) for size in m_splits])


class RMSNorm(nn.Module):
    def __init__(
        self,
        normalized_shape: int | None = None,
        *,
        eps: float,
        params_dtype: torch.dtype,
        hidden_size: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.eps = eps
        width = normalized_shape or hidden_size
        self.weight = nn.Parameter(torch.ones(width, dtype=params_dtype))  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return _Norm.apply(x, self.weight, self.eps)


class DotProductAttention(nn.Module):
    def __init__(self, *, softmax_scale: float | None = None, **options: Any) -> None:
        super().__init__()
        self.scale = softmax_scale

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Any, **options: Any) -> Tensor:
        assert options["attn_mask_type"] == "causal"
        q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
        out = nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=self.scale, enable_gqa=True
        )
        return out.permute(2, 0, 1, 3).flatten(-2)


class _Scales:
    @staticmethod
    def reset() -> None: ...

    @staticmethod
    def is_fp8_enabled() -> bool:
        return False


def _nothing(*args: Any, **kwargs: Any) -> Any:
    return contextlib.nullcontext()


def _types(*names: str) -> dict[str, type]:
    return {name: type(name, (), {}) for name in names}


def install() -> None:
    """Put the modules where an import finds them; before megatron-core is imported."""
    assert "megatron.core" not in sys.modules
    scales = {"FP8GlobalStateManager": _Scales}
    contents: dict[str, dict[str, Any]] = {
        "": {"__version__": "2.20.2"},
        ".common": {},
        ".common.recipe": _types("DelayedScaling", "Format"),
        ".pytorch": {
            **{
                cls.__name__: cls
                for cls in (Linear, LayerNormLinear, GroupedLinear, RMSNorm, DotProductAttention)
            },
            **_types("LayerNorm", "Fp8Padding", "Fp8Unpadding"),
        },
        ".pytorch.fp8": {**scales, "fp8_autocast": _nothing, "fp8_model_init": _nothing},
        ".pytorch.quantization": scales,
        ".pytorch.distributed": {
            **_types("CudaRNGStatesTracker"),
            "activation_recompute_forward": _nothing,
            "checkpoint": _nothing,
            "is_fp8_activation_recompute_enabled": lambda: False,
        },
        ".pytorch.ops": _types("Sequential", "FusibleOperation"),
        ".pytorch.tensor": {"QuantizedTensor": type("QuantizedTensor", (Tensor,), {})},
        ".pytorch.tensor.utils": {
            "replace_raw_data": _nothing,
            "cast_master_weights_to_fp8": _nothing,
        },
        ".pytorch.router": {
            "fused_compute_score_for_moe_aux_loss": None,
            "fused_moe_aux_loss": None,
            "fused_topk_with_score_function": None,
        },
        ".pytorch.graph": {
            name: _nothing
            for name in (
                "restore_fp8_tensors",
                "save_fp8_tensors",
                "set_capture_end",
                "set_capture_start",
                "make_graphed_callables",
            )
        },
    }
    for suffix, names in contents.items():
        module = ModuleType(f"transformer_engine{suffix}")
        module.__spec__ = ModuleSpec(module.__name__, None, is_package=True)
        module.__path__ = []
        vars(module).update(names)
        sys.modules[module.__name__] = module
        parent, _, name = module.__name__.rpartition(".")
        if parent:
            setattr(sys.modules[parent], name, module)
