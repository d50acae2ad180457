"""A provider like Megatron-Bridge's builds our trainer's model."""

from types import SimpleNamespace

import pytest
from helpers import provider
from helpers.oracle import DENSE, run_config
from helpers.pool import WorkerPool

from mhc_megatron.config import MHCConfig
from mhc_megatron.errors import UserError
from mhc_megatron.pretrain.provider import hyper_connect_provider


@pytest.mark.parametrize("pipeline", [1, 2])
def test_the_providers_loss_is_the_trainers(workers: WorkerPool, pipeline: int) -> None:
    mhc = MHCConfig(num_streams=3, contraction="learned")
    config = run_config(DENSE, {"pipeline": pipeline}, mhc=mhc)
    ours, provided = workers.run(provider.losses, pipeline, config)[0]
    assert ours == provided
    assert ours > 1


def test_what_a_provider_would_ignore_is_refused(workers: WorkerPool) -> None:
    cases = {
        "use_transformer_engine_op_fuser": True,
        "use_transformer_engine_full_layer_spec": True,
        "restore_modelopt_state": True,
        "mtp_num_layers": 1,
    }
    options = [{name: value} for name, value in cases.items()]
    told = workers.run(provider.refusals, 1, run_config(DENSE), options)[0]
    assert [message.split(" does not combine")[0] for message in told] == [
        f"{name}={value}" for name, value in cases.items()
    ]


def test_a_mamba_provider_is_refused() -> None:
    with pytest.raises(UserError, match="SimpleNamespace has no transformer_layer_spec"):
        hyper_connect_provider(SimpleNamespace(mamba_stack_spec=None), MHCConfig())
