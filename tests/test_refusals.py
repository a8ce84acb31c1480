"""Messages that the user sees for errors in nnU-Net's commands."""

import json
import subprocess
import sys
from pathlib import Path
from traceback import format_exc

import pytest
import torch
from batchgenerators.utilities.file_and_folder_operations import load_json
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn
from torch.multiprocessing import ProcessRaisedException

from nnunet_conres.errors import InputError
from nnunet_conres.nnunet import stock_trainers
from nnunet_conres.refusals import message_of


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """nnU-Net's folders with one planned data set."""
    for name in ("raw", "preprocessed", "results"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    (tmp_path / "raw" / "Dataset501_BraTS").mkdir()
    planned = tmp_path / "preprocessed" / "Dataset501_BraTS"
    planned.mkdir()
    (planned / "dataset.json").write_text("{}")
    (planned / "nnUNetPlans.json").write_text(json.dumps({"plans_name": "nnUNetPlans"}))
    return tmp_path


def message(error: pytest.ExceptionInfo[BaseException]) -> str | None:
    return message_of(error.value)


class TestMessages:
    """For errors that nnU-Net and torch raise. The tests fail if another release changes the wording."""

    def test_an_unknown_trainer(self) -> None:
        with pytest.raises(RuntimeError) as error:
            recursive_find_trainer_class_by_name("nnUNetTrainerConResnet")
        assert "no trainer nnUNetTrainerConResnet; did you mean nnUNetTrainerConResNet?" in str(message(error))
        with pytest.raises(RuntimeError) as error:
            recursive_find_trainer_class_by_name("nnUNetTrainer_5epoch")
        assert "did you mean nnUNetTrainer_5epochs?" in str(message(error))

    def test_an_unknown_data_set(self) -> None:
        with pytest.raises(RuntimeError) as error:
            maybe_convert_to_dataset_name(502)
        assert message(error) == (
            "There is no data set 502; did you mean Dataset501_BraTS? There are Dataset501_BraTS."
        )

    def test_unknown_plans(self, folders: Path) -> None:
        with pytest.raises(FileNotFoundError) as error:
            load_json(str(folders / "preprocessed" / "Dataset501_BraTS" / "nnUNetPlan.json"))
        assert message(error) == (
            "There are no plans nnUNetPlan for Dataset501_BraTS; did you mean nnUNetPlans? There are nnUNetPlans."
        )

    def test_no_plans(self, folders: Path) -> None:
        (folders / "preprocessed" / "Dataset501_BraTS" / "nnUNetPlans.json").unlink()
        with pytest.raises(FileNotFoundError) as error:
            load_json(str(folders / "preprocessed" / "Dataset501_BraTS" / "nnUNetPlans.json"))
        assert str(message(error)).endswith("Run: nnUNetv2_plan_and_preprocess -d 501")

    def test_an_unknown_configuration(self) -> None:
        plans = PlansManager({"configurations": {"2d": {}, "3d_fullres": {}}})
        with pytest.raises((ValueError, RuntimeError)) as error:
            plans.get_configuration("3d_fulres")
        assert message(error) == (
            "The plans have no configuration 3d_fulres; did you mean 3d_fullres? They have 2d, 3d_fullres."
        )

    def test_another_number_of_channels(self) -> None:
        with pytest.raises(RuntimeError) as error:
            nn.Conv3d(4, 2, 1)(torch.zeros(1, 3, 2, 2, 2))
        assert "cases of 4 image channels, but a case here has 3" in str(message(error))
        assert "CASE_0000 to CASE_0003" in str(message(error))

    @pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
    def test_no_gpu(self) -> None:
        with pytest.raises((AssertionError, RuntimeError)) as error:
            torch.zeros(1).to("cuda")
        assert message(error) == ("There is no CUDA device here that torch can use. To run on the CPU add: -device cpu")

    def test_a_refusal_in_a_process_of_several(self) -> None:
        try:
            raise InputError("what and why")
        except InputError:
            shown = f"\n\n-- Process 0 terminated with the following error:\n{format_exc()}"
        assert message_of(ProcessRaisedException(shown, 0, 1)) == "what and why"

    @pytest.mark.parametrize("error", [FileNotFoundError(2, "no", "x.json"), RuntimeError("x"), KeyError("x")])
    def test_an_error_of_a_program_has_none(self, error: Exception) -> None:
        assert message_of(error) is None


def test_stock_trainers_are_those_that_nnunet_finds() -> None:
    names = stock_trainers()
    assert {"nnUNetTrainer", "nnUNetTrainer_1epoch", "nnUNetTrainerNoMirroring"} <= set(names)
    assert len(names) == len(set(names))


def test_the_hook_shows_a_line_and_leaves_other_errors_alone(tmp_path: Path) -> None:
    code = (
        "import sys; sys.argv[0] = 'bin/' + sys.argv[2];"
        "from nnunet_conres.refusals import show_in_one_line as set_hook;"
        "from nnunet_conres.errors import InputError; set_hook(); set_hook();"
        "raise eval(sys.argv[1])"
    )

    def run(error: str, program: str = "nnUNetv2_train") -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", code, error, program], capture_output=True, text=True, check=False)

    refused, failed = run("InputError('what and why')"), run("ValueError('ours')")
    elsewhere = run("InputError('what and why')", "python")
    assert (refused.returncode, refused.stderr) == (1, "nnunet-conres: error: what and why\n")
    assert elsewhere.stderr.startswith("Traceback")  # another program
    assert failed.returncode == 1
    assert failed.stderr.startswith("Traceback")
    assert message_of(InputError("what and why")) == "what and why"
