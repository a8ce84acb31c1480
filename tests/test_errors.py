import pickle

import pytest

from nnunet_conres.errors import InputError


@pytest.mark.parametrize("faults", ["The id is 0.", ["The id is 0."], ["The id is 0.", "There is no folder."]])
def test_comes_back_whole_from_a_worker_process(faults):
    error = InputError(faults)
    returned = pickle.loads(pickle.dumps(error))
    assert (type(returned), str(returned), returned.faults) == (InputError, str(error), error.faults)


def test_one_message_is_shown_as_it_is():
    assert str(InputError("The id is 0.")) == "The id is 0."


def test_a_list_is_counted():
    error = InputError(["The id is 0.", "There is no folder."])
    assert "2 errors found" in str(error)
    assert all(fault in str(error) for fault in error.faults)
