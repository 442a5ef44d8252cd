"""The criterion inside fairseq, in this process: equality with fairseq's own, weights, logging, error messages."""

import argparse
import logging
import math

import pytest
import torch
from fairseq.logging import metrics
from in_process import gradient, make_criterion, make_model, make_task


@pytest.mark.parametrize("mode", ["stacked", "sequential", "recompute"])
@pytest.mark.parametrize("divergence", ["x", "js"])
def test_without_dropout_it_is_label_smoothed_cross_entropy(task, sample, mode, divergence):
    model = make_model(task)
    ours = make_criterion(task, id_pass_mode=mode, id_divergence=divergence, id_alpha_schedule="constant")
    expected = gradient(model, make_criterion(task, "label_smoothed_cross_entropy"), sample)
    got = gradient(model, ours, sample)
    assert got[0] == pytest.approx(expected[0], rel=1e-6)
    assert got[1] == expected[1] == sample["ntokens"]
    assert abs(got[2]["id_loss"].item()) < 1e-5
    torch.testing.assert_close(got[3], expected[3], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["stacked", "sequential", "recompute"])
def test_loss_is_cross_entropy_plus_alpha_times_divergence(task, sample, mode):
    model = make_model(task, dropout=0.3)
    criterion = make_criterion(task, id_pass_mode=mode)
    for num_updates, alpha in ((0, 0.0), (10, 1.0), (20, 5.0), (99, 5.0)):
        criterion.set_num_updates(num_updates)
        loss, _, log, _ = gradient(model, criterion, sample)
        assert log["id_alpha"] == pytest.approx(alpha)
        assert log["id_loss"] > 0
        assert loss == pytest.approx((log["ls_loss"] + alpha * log["id_loss"]).item(), rel=1e-6)


@pytest.mark.parametrize("divergence", ["x", "js"])
@pytest.mark.parametrize(("k", "factor"), [(2, 2.0), (3, 1.5), (6, 1.2)])
def test_unbiased_scale_multiplies_the_divergence_in_the_loss_and_not_in_the_log(task, sample, k, factor, divergence):
    """--id-scale unbiased: K / (K - 1); loss and gradient are those of an alpha that much larger, id_loss is plain."""
    model = make_model(task, dropout=0.3)
    results = []
    for settings in ({"id_alpha": 2.0}, {"id_alpha": 2.0, "id_scale": "unbiased"}, {"id_alpha": 2.0 * factor}):
        criterion = make_criterion(
            task, id_num_passes=k, id_divergence=divergence, id_alpha_schedule="constant", **settings
        )
        torch.manual_seed(4)
        results.append(gradient(model, criterion, sample))
    published, unbiased, stronger = results
    assert unbiased[0] == pytest.approx(stronger[0], rel=1e-6)
    assert unbiased[0] - published[0] == pytest.approx(2 * (factor - 1) * published[2]["id_loss"].item(), rel=1e-3)
    torch.testing.assert_close(unbiased[3], stronger[3], rtol=1e-4, atol=1e-6)
    assert unbiased[2]["id_loss"] == published[2]["id_loss"] > 0
    assert unbiased[2]["id_alpha"] == published[2]["id_alpha"] == 2


def test_recompute_gives_the_gradients_of_sequential_bit_for_bit(task, sample):
    model = make_model(task, dropout=0.3, attention_dropout=0.1)
    results = []
    for mode in ("sequential", "recompute"):
        criterion = make_criterion(task, id_pass_mode=mode, id_alpha_schedule="constant")
        torch.manual_seed(4)
        results.append(gradient(model, criterion, sample))
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][3], results[1][3])


def test_sequential_draws_the_masks_of_plain_forwards(task, sample):
    model = make_model(task, dropout=0.3)
    plain, ours = make_criterion(task, "label_smoothed_cross_entropy"), make_criterion(task, id_pass_mode="sequential")
    model.train()
    torch.manual_seed(4)
    expected = [plain(model, sample)[0].item() for _ in range(3)]
    torch.manual_seed(4)
    assert ours(model, sample)[2]["ls_loss"].item() == pytest.approx(sum(expected) / 3, rel=1e-6)


def test_sentence_avg_and_ignore_prefix(task, sample):
    model = make_model(task)
    settings = {"sentence_avg": True, "ignore_prefix_size": 1, "report_accuracy": True}
    expected = gradient(model, make_criterion(task, "label_smoothed_cross_entropy", **settings), sample)
    got = gradient(model, make_criterion(task, **settings), sample)
    assert got[1] == expected[1] == 9
    assert got[0] == pytest.approx(expected[0], rel=1e-6)
    assert got[2]["n_correct"].item() == pytest.approx(expected[2]["n_correct"])
    assert got[2]["total"].item() == expected[2]["total"]


def test_validation_is_fairseqs(task, sample):
    model = make_model(task, dropout=0.3)
    expected = task.valid_step(sample, model, make_criterion(task, "label_smoothed_cross_entropy"))
    got = task.valid_step(sample, model, make_criterion(task))
    assert got[0].item() == expected[0].item()
    assert got[1] == expected[1]
    assert set(got[2]) == set(expected[2])


def test_the_task_hands_on_the_update_number(task, sample):
    model, criterion = make_model(task, dropout=0.3), make_criterion(task)
    optimizer = argparse.Namespace(backward=lambda loss: loss.backward())
    for update_num in (0, 7, 7, 50):
        _, _, log = task.train_step(sample, model, criterion, optimizer, update_num)
        assert log["id_alpha"] == criterion.alpha_schedule(update_num)


def test_logged_scalars_are_per_token_and_base_two(task, sample):
    model, criterion = make_model(task, dropout=0.3), make_criterion(task)
    criterion.set_num_updates(15)
    loss, _, log, _ = gradient(model, criterion, sample)
    with metrics.aggregate() as aggregator:
        type(criterion).reduce_metrics([log, log])
    values = aggregator.get_smoothed_values()
    per_token = 1 / sample["ntokens"] / math.log(2)
    assert values["loss"] == pytest.approx(loss * per_token, abs=1e-3)
    assert values["ls_loss"] == pytest.approx(log["ls_loss"].item() * per_token, abs=1e-3)
    assert values["nll_loss"] == pytest.approx(log["nll_loss"].item() * per_token, abs=1e-3)
    assert values["id_loss"] == pytest.approx(log["id_loss"].item() * per_token, abs=1e-5)
    assert values["id_alpha"] == pytest.approx(criterion.alpha_schedule(15), abs=1e-6)
    assert values["loss"] == pytest.approx(values["ls_loss"] + values["id_alpha"] * values["id_loss"], abs=2e-3)
    assert values["ppl"] == pytest.approx(2 ** values["nll_loss"], rel=1e-2)


def test_all_dropout_at_zero_is_warned_about_once(task, sample, caplog):
    model, criterion = make_model(task, dropout=0.0), make_criterion(task)
    with caplog.at_level(logging.WARNING):
        gradient(model, criterion, sample)
        gradient(model, criterion, sample)
    warnings = [r.getMessage() for r in caplog.records if "every dropout of the model is 0" in r.getMessage()]
    assert len(warnings) == 1
    assert "the 3 passes are identical" in warnings[0]


def test_no_warning_with_dropout(task, sample, caplog):
    with caplog.at_level(logging.WARNING):
        gradient(make_model(task, dropout=0.1), make_criterion(task), sample)
    assert "dropout" not in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"id_num_passes": 1}, "error: --id-num-passes is 1: allowed is at least 2"),
        ({"id_alpha": -0.5}, "error: --id-alpha is -0.5: allowed is a number of at least 0"),
        ({"id_p": 10.0}, "error: --id-p is 10.0 and --id-q is 10.0: allowed is 0 < p < q"),
        ({"max_update": 0}, "error: --max-update is 0: allowed is a number above 0"),
    ],
)
def test_wrong_flags_end_with_one_line(task, settings, message):
    with pytest.raises(SystemExit) as error:
        make_criterion(task, **settings)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_stock_task_takes_the_constant_schedule_only(tiny_data, sample):
    stock = make_task(tiny_data, "translation")
    criterion = make_criterion(stock, id_alpha_schedule="constant", id_alpha=2.0)
    assert gradient(make_model(stock, dropout=0.3), criterion, sample)[2]["id_alpha"] == 2.0
    with pytest.raises(
        SystemExit, match="^error: --task is one that does not tell .*use --task translation_intra_distil"
    ):
        make_criterion(stock)


def test_batches_are_those_of_a_fresh_training_whatever_the_epoch(tiny_data):
    """P2: without the mend a run resumed in epoch 3 trains on other batches than one that never stopped."""

    def batches(name, epoch):
        task = make_task(tiny_data, name)
        task.load_dataset("train")
        iterator = task.get_batch_iterator(task.datasets["train"], max_tokens=100, seed=1, epoch=epoch)
        return iterator.epoch, [list(b) for b in iterator.frozen_batches]

    stock, ours = "translation", "translation_intra_distillation"
    fresh = batches(stock, 1)[1]
    assert batches(ours, 1) == (1, fresh)
    assert batches(ours, 3) == (3, fresh)
    assert batches(stock, 3)[1] != fresh, "fairseq composes the same batches in every epoch: ExactResumeMixin can go"
