from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nnunet_conres.trainers import nnUNetTrainerVNet
from nnunet_conres.trainers.resume import CHECKPOINT_VARIABLE
from nnunet_conres.workflow import step


class TestCheckpointInterval:
    def test_is_five_minutes(self, make_trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv(CHECKPOINT_VARIABLE, raising=False)
        assert make_trainer(nnUNetTrainerVNet).checkpoint_interval_minutes == 5

    def test_the_environment_may_say_otherwise(
        self, make_trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv(CHECKPOINT_VARIABLE, "0.5")
        assert make_trainer(nnUNetTrainerVNet).checkpoint_interval_minutes == 0.5

    @pytest.mark.usefixtures("nothing_is_written")
    @pytest.mark.parametrize("text", ["often", "-1", "nan"])
    def test_nonsense_is_refused(
        self, make_trainer: Callable[..., Any], results: Path, monkeypatch: pytest.MonkeyPatch, text: str
    ) -> None:
        monkeypatch.setenv(CHECKPOINT_VARIABLE, text)
        with pytest.raises(ValueError, match=f"is '{text}'; expected minutes"):
            make_trainer(nnUNetTrainerVNet)

    def test_the_workflow_sets_the_very_variable(self) -> None:
        assert step.CHECKPOINT_VARIABLE == CHECKPOINT_VARIABLE
