"""What a training run is: frozen dataclasses and the checks that need no torch."""

from dataclasses import dataclass, field
from typing import Literal, get_args

from mhc_megatron.config import MHCConfig
from mhc_megatron.errors import UserError
from mhc_megatron.refusals import refuse_first
from mhc_megatron.training.guard import GuardConfig
from mhc_megatron.training.layout import ParallelConfig, require_positive

Residual = Literal["mhc", "plain"]
FP8Recipe = Literal["delayed", "tensorwise", "blockwise", "mxfp8"]
AmaxAlgorithm = Literal["most_recent", "max"]
# Tokens of a micro-batch on a rank: the inner dimension of the weights' gradients.
_FP8_TOKENS = 16


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The transformer, in Megatron's terms.

    Attributes:
        residual: ``mhc`` wraps every branch in hyper-connections; ``plain`` is Megatron's own
            residual, the baseline.
        num_query_groups: key/value heads of grouped-query attention; None means one per head.
        num_moe_experts: routed experts per MoE layer; None makes every MLP dense.
        moe_expert_capacity_factor: Megatron's; an expert takes as many tokens of a micro-batch as
            its even share times this, and the others pass it by; with fewer its input is padded,
            so that the host need not know the number. None: no token is dropped.
        moe_layer_freq: one MoE layer every this many layers, the first included.
        moe_token_dispatcher: Megatron's: ``alltoall``, or ``flex`` with DeepEP, which needs GPUs,
            the package deep_ep and bf16.
        multi_latent_attention: DeepSeek's MLA instead of multi-head attention.
        mtp_num_layers: multi-token-prediction depths; None for none.
    """

    residual: Residual = "mhc"
    num_layers: int = 4
    hidden_size: int = 128
    num_attention_heads: int = 4
    num_query_groups: int | None = None
    ffn_hidden_size: int = 512
    seq_length: int = 256
    init_method_std: float = 0.02
    norm_eps: float = 1e-5
    num_moe_experts: int | None = None
    moe_router_topk: int = 2
    moe_ffn_hidden_size: int = 256
    moe_expert_capacity_factor: float | None = None
    moe_layer_freq: int = 1
    moe_aux_loss_coeff: float = 0.01
    moe_token_dispatcher: Literal["alltoall", "flex"] = "alltoall"
    multi_latent_attention: bool = False
    mtp_num_layers: int | None = None
    mtp_loss_scaling_factor: float = 0.1

    def __post_init__(self) -> None:
        require_positive(
            "model",
            self,
            "num_layers",
            "hidden_size",
            "num_attention_heads",
            "ffn_hidden_size",
            "seq_length",
        )
        if self.residual not in ("mhc", "plain"):
            raise UserError(f"model.residual={self.residual!r} is not one of mhc, plain")
        if self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"model.hidden_size={self.hidden_size} is not divisible by "
                f"model.num_attention_heads={self.num_attention_heads}; change one of them"
            )
        groups = self.num_query_groups
        if groups is not None and (groups < 1 or self.num_attention_heads % groups):
            raise UserError(
                f"model.num_query_groups={groups} does not divide "
                f"model.num_attention_heads={self.num_attention_heads}"
            )
        if self.num_moe_experts is not None and self.moe_router_topk > self.num_moe_experts:
            raise UserError(
                f"model.moe_router_topk={self.moe_router_topk} exceeds "
                f"model.num_moe_experts={self.num_moe_experts}"
            )
        capacity = self.moe_expert_capacity_factor
        if capacity is not None and not capacity > 0:
            raise UserError(
                f"model.moe_expert_capacity_factor={capacity} must be positive; None drops no token"
            )
        if capacity is not None and self.num_moe_experts is None:
            raise UserError(
                f"model.moe_expert_capacity_factor={capacity} needs model.num_moe_experts; this "
                "model is dense"
            )
        if self.moe_token_dispatcher not in ("alltoall", "flex"):
            raise UserError(
                f"model.moe_token_dispatcher={self.moe_token_dispatcher!r} is not one of alltoall, "
                "flex"
            )


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with warm-up and a decay.

    Attributes:
        decay: ``cosine`` from lr to min_lr, or ``step``, the mHC paper's: lr x 0.316 from 80 %
            and x 0.1 from 90 % of the steps.
        warmup_steps: linear warm-up from zero.
        clip_grad: maximum global gradient norm; 0 turns clipping off.
    """

    lr: float = 1e-3
    min_lr: float = 1e-4
    warmup_steps: int = 20
    decay: Literal["cosine", "step"] = "cosine"
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip_grad: float = 1.0

    def __post_init__(self) -> None:
        if self.decay not in ("cosine", "step"):
            raise UserError(f"optimizer.decay={self.decay!r} is not one of cosine, step")
        if not self.lr > 0:
            raise UserError(f"optimizer.lr={self.lr} must be positive")
        if not 0 <= self.min_lr <= self.lr:
            raise UserError(
                f"optimizer.min_lr={self.min_lr} must lie between 0 and optimizer.lr={self.lr}"
            )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Token data in Megatron's ``.bin``/``.idx`` format.

    Attributes:
        train, valid: path prefixes of the two splits (without ``.bin``/``.idx``). Empty means the
            embedded corpus, the running Python's standard-library sources, prepared on first use.
        tokenizer: the tokenizer of the embedded corpus; its size is the vocabulary of the model.
    """

    train: str = ""
    valid: str = ""
    tokenizer: str = "byte"


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run.

    Attributes:
        steps: optimizer steps in all.
        micro_batch_size: sequences per micro-batch and data-parallel rank.
        global_batch_size: sequences per step over all data-parallel ranks.
        dtype: parameter and activation dtype of the layers; bf16 and fp16 keep float32 main
            weights. The hyper-connections' own parameters are float32 always.
        recompute: ``full`` re-runs every layer in the backward; ``core_attn`` only the attention
            core; ``none`` keeps all activations.
        eval_interval: steps between validations (and gain-magnitude probes); 0 for none.
        eval_iters: validation steps of ``global_batch_size`` sequences each.
        save_interval: steps between checkpoints; 0 saves only at the end.
        async_save: write checkpoints in the background while training goes on.
        keep_checkpoints: how many of the newest whole checkpoints stay on disk.
        profile_step: this step, counted from 1, is recorded by torch's profiler on every rank, into
            ``out``/traces; 0 for none. Recording makes the step longer.
        timeout_minutes: until a process that does not answer the others is an error.
        out: run directory: metrics, report, TensorBoard, checkpoints.
        transformer_impl: ``local`` (megatron-core's own modules) or ``transformer_engine``.
        cuda_graph: from the third step on, all forwards and backwards of a step are one CUDA
            graph, which the host launches at once (megatron/step_graph.py).
        fp8: number format of the matrix products in the branches, Megatron's ``--fp8-format``:
            ``hybrid`` (e4m3, gradients in e5m2) or ``e4m3``; None for none. The streams, their
            coefficients, the embedding and the output layer stay in ``dtype``.
        fp8_recipe: how FP8 is scaled, Megatron's: by the largest of earlier steps (``delayed``),
            of the tensor (``tensorwise``), of blocks (``blockwise``, and on Blackwell ``mxfp8``).
        fp8_amax_history_len: steps that ``delayed`` scaling looks back, Megatron's.
        fp8_amax_compute_algo: which of them it takes, Megatron's: the last one, ``most_recent``,
            or that with the largest number, ``max``.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    mhc: MHCConfig = field(default_factory=MHCConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    steps: int = 200
    micro_batch_size: int = 4
    global_batch_size: int = 8
    seed: int = 1234
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    recompute: Literal["none", "core_attn", "full"] = "none"
    eval_interval: int = 20
    eval_iters: int = 2
    save_interval: int = 0
    async_save: bool = False
    keep_checkpoints: int = 2
    profile_step: int = 0
    timeout_minutes: float = 10.0
    out: str = "runs/train"
    transformer_impl: Literal["local", "transformer_engine"] = "local"
    cuda_graph: bool = False
    fp8: Literal["hybrid", "e4m3"] | None = None
    fp8_recipe: FP8Recipe = "delayed"
    fp8_amax_history_len: int = 1
    fp8_amax_compute_algo: AmaxAlgorithm = "most_recent"

    def __post_init__(self) -> None:
        for name in ("steps", "micro_batch_size", "global_batch_size", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")
        if not 0 <= self.profile_step <= self.steps:
            raise UserError(
                f"profile_step={self.profile_step} is none of the steps 1 to {self.steps}; choose "
                "one, or 0 for none"
            )
        if self.timeout_minutes <= 0:
            raise UserError(f"timeout_minutes={self.timeout_minutes} must be positive")
        self.guard.check_saves(self.save_interval)
        for name, allowed in (
            ("dtype", ("fp32", "bf16", "fp16")),
            ("recompute", ("none", "core_attn", "full")),
            ("transformer_impl", ("local", "transformer_engine")),
            ("fp8", (None, "hybrid", "e4m3")),
            ("fp8_recipe", get_args(FP8Recipe)),
            ("fp8_amax_compute_algo", get_args(AmaxAlgorithm)),
        ):
            if getattr(self, name) not in allowed:
                raise UserError(
                    f"{name}={getattr(self, name)!r} is not one of {', '.join(map(str, allowed))}"
                )
        per_step = self.micro_batch_size * self.parallel.data
        if self.global_batch_size % per_step:
            raise UserError(
                f"global_batch_size={self.global_batch_size} is not divisible by "
                f"micro_batch_size * parallel.data = {self.micro_batch_size} * "
                f"{self.parallel.data} = {per_step}; use a multiple of {per_step}"
            )
        layout, model = self.parallel, self.model
        layout.check_layers(model.num_layers)
        if model.residual == "mhc":
            self.mhc.block_of(2 * min(layout.stage_layers(model.num_layers)))
            if self.recompute == "full":
                self.mhc.reject_recompute_of_layers(
                    "recompute='full'", "set mhc.recompute='none', or recompute='core_attn'"
                )
        layout.check_overlap(
            recompute=self.recompute,
            policy=self.mhc.recompute if model.residual == "mhc" else None,
        )
        layout.check_message_width(self.hidden_parts * model.hidden_size)
        layout.check_micro_batches(self.num_micro_batches)
        layout.check_prediction_layers(model.mtp_num_layers)
        if layout.virtual > 1 and self.num_micro_batches % layout.pipeline:
            raise UserError(
                f"{self.num_micro_batches} micro-batches per step are not divisible by "
                f"parallel.pipeline={layout.pipeline}, which interleaved 1F1B needs; "
                "change global_batch_size"
            )
        if layout.virtual > 1 and layout.pipeline == 2:
            raise UserError(
                "parallel.pipeline=2 with parallel.virtual > 1 sends to the same peer in both "
                "directions, and batched p2p then mixes up the messages; use parallel.pipeline > 2 "
                "or parallel.virtual=1"
            )
        for name in ("num_attention_heads", "ffn_hidden_size"):
            if (size := getattr(model, name)) % layout.tensor:
                raise UserError(
                    f"model.{name}={size} is not divisible by parallel.tensor={layout.tensor}"
                )
        if layout.sequence and model.seq_length % (layout.tensor * layout.context):
            raise UserError(
                f"model.seq_length={model.seq_length} is not divisible by parallel.tensor * "
                f"parallel.context = {layout.tensor * layout.context}, which sequence "
                "parallelism needs"
            )
        if layout.context > 1 and self.transformer_impl == "local":
            raise UserError(
                f"parallel.context={layout.context} needs "
                "transformer_impl='transformer_engine': megatron-core's local attention does not "
                "exchange keys and values over context-parallel ranks"
            )
        if self.dtype != "fp32" and not layout.distributed_optimizer:
            raise UserError(
                f"dtype={self.dtype!r} needs parallel.distributed_optimizer=True: Megatron's other "
                "half-precision optimizer cannot checkpoint a model whose hyper-connections stay "
                "float32"
            )
        if layout.context > 1 and model.seq_length % (2 * layout.context):
            raise UserError(
                f"model.seq_length={model.seq_length} is not divisible by 2 * parallel.context = "
                f"{2 * layout.context}, which context parallelism's load balancing needs"
            )
        if layout.expert > 1 and model.num_moe_experts is None:
            raise UserError(
                f"parallel.expert={layout.expert} needs model.num_moe_experts; this model is dense"
            )
        if model.num_moe_experts is not None and model.num_moe_experts % layout.expert:
            raise UserError(
                f"model.num_moe_experts={model.num_moe_experts} is not divisible by "
                f"parallel.expert={layout.expert}"
            )
        if model.num_moe_experts is not None and layout.tensor > 1 and not layout.sequence:
            raise UserError(
                "MoE with parallel.tensor > 1 needs parallel.sequence=True (megatron-core's rule)"
            )
        self._check_fp8()
        if model.moe_token_dispatcher == "flex":
            self._check_flex()
        if self.cuda_graph:
            self._check_graph()

    def _check_flex(self) -> None:
        layout, alltoall = self.parallel, "set model.moe_token_dispatcher='alltoall'"
        refusals = (
            (
                self.model.num_moe_experts is None,
                "model.num_moe_experts=None",
                "a dense model dispatches no tokens",
                alltoall,
            ),
            (
                layout.tensor * layout.expert == 1,
                "parallel.expert=1 and parallel.tensor=1",
                "Megatron has it exchange tokens between ranks only",
                f"raise parallel.expert, or {alltoall}",
            ),
            (
                self.dtype != "bf16",
                f"dtype={self.dtype!r}",
                "DeepEP sums up tokens in bf16 only",
                f"set dtype='bf16', or {alltoall}",
            ),
            (
                self.model.moe_expert_capacity_factor is not None,
                f"model.moe_expert_capacity_factor={self.model.moe_expert_capacity_factor}",
                "DeepEP does not pad what experts get",
                f"set it to None, or {alltoall}",
            ),
            (
                self.cuda_graph,
                "cuda_graph=True",
                "the host waits in the step for the number of tokens",
                f"set cuda_graph=False, or {alltoall}",
            ),
        )
        refuse_first("model.moe_token_dispatcher='flex'", refusals, what_first=True)

    def _check_graph(self) -> None:
        refusals = (
            (
                self.model.num_moe_experts is not None
                and self.model.moe_expert_capacity_factor is None,
                f"model.num_moe_experts={self.model.num_moe_experts}",
                "the host reads how many tokens each expert has",
                "set model.moe_expert_capacity_factor, or set cuda_graph=False",
            ),
            (
                self.dtype == "fp16",
                "dtype='fp16'",
                "the loss scale would stay what it was when the step was captured",
                "use bf16, or set cuda_graph=False",
            ),
            (
                self.parallel.context > 1,
                f"parallel.context={self.parallel.context}",
                "Megatron copies indices from the host while it slices micro-batches",
                "use parallel.context=1, or set cuda_graph=False",
            ),
            (
                self.recompute != "none",
                f"recompute={self.recompute!r}",
                "Megatron's recompute copies the states of random numbers to the host",
                "use recompute='none', with mhc.recompute as you like, or set cuda_graph=False",
            ),
        )
        refuse_first("cuda_graph=True", refusals, what_first=True)

    def _check_fp8(self) -> None:
        history, algorithm = self.fp8_amax_history_len, self.fp8_amax_compute_algo
        if history < 1:
            raise UserError(f"fp8_amax_history_len={history} must be at least 1")
        delayed = self.fp8 is not None and self.fp8_recipe == "delayed"
        if (history, algorithm) != (1, "most_recent") and not delayed:
            raise UserError(
                f"fp8_amax_history_len={history}, fp8_amax_compute_algo={algorithm!r}: only "
                f"delayed scaling has a history, and fp8={self.fp8!r} with "
                f"fp8_recipe={self.fp8_recipe!r} would ignore them; leave both out, or set fp8 and "
                "fp8_recipe='delayed'"
            )
        if self.fp8 is None:
            return
        if self.transformer_impl != "transformer_engine":
            raise UserError(
                f"fp8={self.fp8!r} needs transformer_impl='transformer_engine': megatron-core's "
                "local modules would ignore it"
            )
        layout = self.parallel
        shards = layout.context * (layout.tensor if layout.sequence else 1)
        tokens = self.micro_batch_size * self.model.seq_length // shards
        if tokens % _FP8_TOKENS:
            raise UserError(
                f"fp8={self.fp8!r}: a micro-batch has {tokens} tokens on a rank (micro_batch_size "
                f"* model.seq_length / {shards}), which is not divisible by {_FP8_TOKENS}; change "
                "one of them"
            )

    @property
    def hidden_parts(self) -> int:
        """What layers hand on, in hidden sizes: of ``MHCConfig``, 1 for the plain residual."""
        return self.mhc.hidden_parts if self.model.residual == "mhc" else 1

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches per step and data-parallel rank."""
        return self.global_batch_size // (self.micro_batch_size * self.parallel.data)
