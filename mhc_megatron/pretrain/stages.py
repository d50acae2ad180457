"""Model chunks for the stages of a schedule, built by Megatron's own builder of GPT models."""

from typing import Any

from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import Float16Module
from megatron.training import get_args
from megatron.training.models.base import compose_hooks
from megatron.training.models.dist_utils import (
    prepare_existing_model_chunks_for_distributed_training,
)
from megatron.training.models.gpt import GPTModelBuilder

from mhc_megatron.megatron.chunks import stage_place
from mhc_megatron.megatron.split_linear import split_linears
from mhc_megatron.training.runtime import set_seed


class StageFloat16Module(Float16Module):
    """Megatron's wrapper of a half-precision chunk, which would judge by the pipeline rank.

    On the last rank it makes every output float32. What a stage sends to the next has the layers'
    dtype, whatever rank it is on.
    """

    def forward(self, *inputs: Any, **arguments: Any) -> Any:
        """As Float16Module's, which is told whether the chunk ends the model."""
        return super().forward(*inputs, fp32_output=self.module.post_process, **arguments)


class StageModelBuilder(GPTModelBuilder):
    """Builds this rank's stages of ``model_config.placement``, in the order of the model's layers.

    ``model_config.transformer`` has as many pipeline ranks as there are stages; the layer spec
    takes ``pp_rank``, the stage.
    """

    def build_stage(self, stage: int, pg_collection: ProcessGroupCollection) -> GPTModel:
        """The chunk of ``stage``, on whatever rank it is.

        Args:
            stage: of the model, numbered from the input to the loss.
            pg_collection: Megatron's process groups.
        """
        config = self._model_config
        # Weights depend on the stage, as those of mhc-megatron train.
        set_seed(get_args().seed, stage=stage)
        place = stage_place(config.transformer, stage)
        spec = config.transformer_layer_spec
        config.transformer_layer_spec = lambda config: spec(config, pp_rank=stage)
        try:
            chunk = self.build_model(
                place.groups, pre_process=place.pre_process, post_process=place.post_process
            )
        finally:
            config.transformer_layer_spec = spec
        split_linears(chunk)
        # The loop asks the first chunk which rank reports losses: Megatron's last pipeline rank.
        chunk.pg_collection = pg_collection
        return chunk

    def build_distributed_models(
        self,
        pg_collection: ProcessGroupCollection,
        ddp_config: DistributedDataParallelConfig | None = None,
        **arguments: Any,
    ) -> list[GPTModel]:
        """As ``GPTModelBuilder.build_distributed_models``, with the stages of this rank."""
        config = self._model_config
        rank = parallel_state.get_pipeline_model_parallel_rank()
        chunks = [
            self.build_stage(stage, pg_collection) for stage in config.placement.stages_on(rank)
        ]
        chunks = compose_hooks(config.pre_wrap_hooks)(chunks)
        if ddp_config is not None:
            ddp_config.delay_wgrad_compute = config.transformer.delay_wgrad_compute
        chunks = prepare_existing_model_chunks_for_distributed_training(
            chunks,
            config.transformer,
            pg_collection,
            ddp_config=ddp_config,
            mixed_precision_wrapper=StageFloat16Module,
            **arguments,
        )
        wrapped: list[GPTModel] = compose_hooks(config.post_wrap_hooks)(chunks)
        return wrapped
