import torch

from nnunet_conres.trainers.schedules import StepLRScheduler


def test_divides_by_ten_and_keeps_no_state() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = StepLRScheduler(optimizer, 0.5, step_epochs=2.5)
    rates = []
    for epoch in (0, 1, 2, 3, 4, 5, 0):  # a training that is continued jumps to its epoch
        scheduler.step(epoch)
        rates.append(optimizer.param_groups[0]["lr"])
    torch.testing.assert_close(rates, [0.5, 0.5, 0.5, 0.05, 0.05, 0.005, 0.5])
    assert scheduler.get_last_lr() == [0.5]
