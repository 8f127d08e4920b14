"""Preference losses against TRL's on the same rows, and their independence of how a step is cut."""

import math
import warnings
from collections import defaultdict
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from preference_rows import draw_adapters, labelled_rows, pair_rows, parts, written
from tiny_runs import plain_trainer, tiny_config

from lightning_peft.adapters.inject import disable_adapters
from lightning_peft.checkpoint.peft_format import save_adapter
from lightning_peft.checkpoint.resume import trainable_state_dict
from lightning_peft.commands.adapted import load_for_inference, saved_config
from lightning_peft.commands.evaluate import evaluate, validation_data
from lightning_peft.commands.train import train
from lightning_peft.compose import compose_config
from lightning_peft.data.batch import IGNORED_LABEL
from lightning_peft.data.preferences import Standing
from lightning_peft.evaluation.gate import bootstrap
from lightning_peft.models.loading import load_tokenizer
from lightning_peft.models.source import ModelConfig

PAIRS = pair_rows(7)
FP32 = {"rtol": 1e-5, "atol": 1e-5}
"""Sums over some tens of tokens, taken in another order."""


def plain_log_probabilities(model, samples):
    """Return (summed log-probability, number) of the trained tokens of each sample, run alone, by torch's softmax."""
    found = []
    for sample in samples:
        logits = model(input_ids=torch.tensor([sample.input_ids]), use_cache=False).logits[0, :-1].float()
        labels = torch.tensor(sample.labels[1:])
        kept = labels != IGNORED_LABEL
        found.append((logits[kept].log_softmax(-1).gather(1, labels[kept, None]).sum(), float(kept.sum())))
    return torch.stack([value for value, _ in found]), torch.tensor([count for _, count in found])


def plain_pairs(module, data):
    """Return policy and reference log-probabilities and lengths, (P,) each, of chosen and rejected answers."""
    samples = data.training_samples
    each = [samples.unit(place) for place in range(len(samples.unit_lengths))]
    found = []
    for place in (0, 1):
        answers = [unit[place] for unit in each]
        policy, counts = plain_log_probabilities(module.model, answers)
        with torch.no_grad(), disable_adapters(module.model):
            reference, _ = plain_log_probabilities(module.model, answers)
        found.append((policy, reference, counts))
    return found


def mean_loss(module, data):
    """Return the objective's mean over all rows, and the means of what it measures."""
    total, weight, sums = 0.0, 0.0, defaultdict(lambda: [0.0, 0.0])
    for batch in data.train_dataloader():
        total = total + module.objective(batch)
        weight += module.objective.loss_weight(batch)
        for name, (value, count) in module.objective.measured.items():
            sums[name][0] += float(value)
            sums[name][1] += float(count)
    return total / weight, {name: value / count for name, (value, count) in sums.items()}


def gradients(module, loss):
    trained = [parameter for parameter in module.model.parameters() if parameter.requires_grad]
    return torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, trained)])


def trl_dpo_loss(kind, beta, chosen, rejected, sft_weight=None):
    """Run TRL's own DPO code on log-probabilities of whole answers, each given as that of one token."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.trainer.dpo_trainer import DPOTrainer
    (policy_w, reference_w, length_w), (policy_l, reference_l, length_l) = chosen, rejected
    lengths = torch.cat([length_w, length_l]).long()
    mask = torch.arange(1 + int(lengths.max())) >= 1
    completion_mask = (mask & (torch.arange(len(mask)) <= lengths[:, None])).long()
    log_probs = torch.zeros(len(lengths), len(mask) - 1)
    log_probs = torch.cat([torch.cat([policy_w, policy_l])[:, None], log_probs[:, 1:]], 1)
    outputs = SimpleNamespace(
        log_probs=log_probs, entropy=torch.zeros_like(log_probs), mean_logits=torch.zeros_like(log_probs),
        is_top1=torch.zeros_like(log_probs, dtype=torch.bool),
    )  # fmt: skip
    kinds, weights = ([kind], [1.0]) if sft_weight is None else ([kind, "sft"], [1.0, sft_weight])
    trainer = SimpleNamespace(
        model=torch.nn.Identity(), accelerator=SimpleNamespace(device="cpu", gather=lambda x: x,
        gather_for_metrics=lambda x: x), aux_loss_enabled=False, ld_alpha=None, precompute_ref_logps=True,
        f_divergence_type="reverse_kl", loss_types=kinds, loss_weights=weights, beta=beta, label_smoothing=0.0,
        use_weighting=False, _metrics=defaultdict(lambda: defaultdict(list)), _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    inputs = {
        "input_ids": torch.zeros_like(completion_mask), "attention_mask": torch.ones_like(completion_mask),
        "completion_mask": completion_mask, "ref_chosen_logps": reference_w, "ref_rejected_logps": reference_l,
    }  # fmt: skip
    loss = DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False)
    return loss, {name: values[0] for name, values in trainer._metrics["train"].items()}


def trl_pair_loss(loss_type, chosen, rejected, **options):
    """Run TRL's CPO code, whose losses take what is compared as it is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.experimental.cpo.cpo_trainer import CPOTrainer
    known = {"alpha": 0.0, "label_smoothing": 0.0, "simpo_gamma": 0.0, "accelerator": SimpleNamespace(device="cpu")}
    return CPOTrainer.cpo_loss(SimpleNamespace(loss_type=loss_type, **known | options), chosen, rejected)[0].mean()


def trl_orpo_loss(weight, chosen, rejected):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.experimental.orpo.orpo_trainer import ORPOTrainer
    trainer = SimpleNamespace(beta=weight, accelerator=SimpleNamespace(device="cpu"))
    return -chosen.mean() - ORPOTrainer.odds_ratio_loss(trainer, chosen, rejected)[0].mean()


def expected_loss(name, module, data):
    (policy_w, reference_w, length_w), (policy_l, reference_l, length_l) = chosen, rejected = plain_pairs(module, data)
    if name == "dpo":
        return trl_dpo_loss("sigmoid", 0.1, chosen, rejected)[0]
    if name == "rpo":  # pair by pair: TRL's mean is over the tokens of a batch, the paper's over those of an answer
        each = [[[part[[i]] for part in answers] for answers in (chosen, rejected)] for i in range(len(policy_w))]
        return torch.stack([trl_dpo_loss("sigmoid", 0.1, *pair, sft_weight=0.7)[0] for pair in each]).mean()
    if name == "ipo":
        return trl_dpo_loss("ipo", 0.1, chosen, rejected)[0]
    if name == "cdpo":
        return trl_pair_loss("sigmoid", policy_w - reference_w, policy_l - reference_l, beta=0.1, label_smoothing=0.2)
    if name == "simpo":
        return trl_pair_loss("simpo", policy_w / length_w, policy_l / length_l, beta=2.0, simpo_gamma=1.0)
    return trl_orpo_loss(0.1, policy_w / length_w, policy_l / length_l)


VARIANTS = {"cdpo": "objective.label_smoothing=0.2", "rpo": "objective.sft_weight=0.7"}


@pytest.mark.parametrize("name", ["dpo", *VARIANTS, "ipo", "simpo", "orpo"])
def test_loss_and_gradient_are_trls(name, tmp_path):
    more = [VARIANTS[name]] if name in VARIANTS else []
    objective = "dpo" if name in VARIANTS else name
    module, data = parts(tmp_path, objective, PAIRS, "data.micro_batch_size=2", *more)
    loss, _ = mean_loss(module, data)
    expected = expected_loss(name, module, data)
    torch.testing.assert_close(loss, expected, **FP32)
    torch.testing.assert_close(gradients(module, loss), gradients(module, expected), rtol=1e-4, atol=1e-5)


def test_rewards_are_trls(tmp_path):
    module, data = parts(tmp_path, "dpo", PAIRS)
    with torch.no_grad():
        _, measured = mean_loss(module, data)
        _, expected = trl_dpo_loss("sigmoid", 0.1, *plain_pairs(module, data))
    ours = {"chosen": "chosen", "rejected": "rejected", "margin": "margins", "accuracy": "accuracies"}
    for name, theirs in ours.items():
        assert measured[f"rewards/{name}"] == pytest.approx(expected[f"rewards/{theirs}"], rel=1e-4, abs=1e-5)
    for name in ("logps/chosen", "logps/rejected"):
        assert measured[name] == pytest.approx(expected[name], rel=1e-5)


def test_kto_is_the_papers_formula_with_the_distance_of_the_step_before(tmp_path):
    module, data = parts(tmp_path, "kto", labelled_rows(6), "objective.undesirable_weight=1.5")
    module.objective.after_step({"kl": torch.tensor(0.3, dtype=torch.float64)})
    loss, measured = mean_loss(module, data)
    (policy, reference, _), (other, other_reference, _) = plain_pairs(module, data)
    distance = (other - other_reference).detach()
    samples = data.training_samples
    units = [samples.unit(place) for place in range(6)]
    assert all(unit[1].standing is Standing.mismatched for unit in units)
    wanted = torch.tensor([unit[0].standing is Standing.chosen for unit in units])
    ratios = policy - reference
    losses = torch.where(
        wanted, 1 - torch.sigmoid(0.1 * (ratios - 0.3)), 1.5 * (1 - torch.sigmoid(0.1 * (0.3 - ratios)))
    )
    torch.testing.assert_close(loss, losses.mean(), **FP32)
    torch.testing.assert_close(gradients(module, loss), gradients(module, losses.mean()), rtol=1e-4, atol=1e-5)
    assert measured["kl"] == pytest.approx(float(distance.mean()), rel=1e-4)
    assert measured["rewards/chosen"] == pytest.approx(float((0.1 * ratios.detach())[wanted].mean()), rel=1e-4)


HEADS = [[], ["adapter.trainable_modules=[lm_head]"], ["adapter.target_modules=[q_proj,lm_head]"]]


@pytest.mark.parametrize(("name", "words"), [*(("dpo", words) for words in HEADS), ("kto", [])])
def test_validation_measures_the_divergence_from_the_reference_over_the_vocabulary(name, words, tmp_path):
    """KL(p || p_ref) by torch's kl_div of whole logits, over the answers' tokens; not in training."""
    module, data = parts(tmp_path, name, labelled_rows(6) if name == "kto" else PAIRS, *words)
    with torch.no_grad():
        if "adapter.trainable_modules=[lm_head]" in words:
            module.model.lm_head.weight.mul_(1.5)
        found = []
        for sample in (data.training_samples[place] for place in range(len(data.training_samples))):
            if sample.standing is Standing.mismatched:
                continue
            kept = torch.tensor(sample.labels[1:]) != IGNORED_LABEL
            inputs = {"input_ids": torch.tensor([sample.input_ids]), "use_cache": False}
            own = module.model(**inputs).logits[0, :-1][kept].log_softmax(-1)
            with module.objective.as_reference():
                start = module.model(**inputs).logits[0, :-1][kept].log_softmax(-1)
            found.append(F.kl_div(start, own, reduction="none", log_target=True).sum(-1))
    _, trained = mean_loss(module, data)
    assert "kl_per_token" not in trained
    module.eval()
    with torch.inference_mode():
        _, measured = mean_loss(module, data)
    assert measured.pop("kl_per_token") == pytest.approx(float(torch.cat(found).mean()), rel=1e-4) != 0
    assert measured == pytest.approx(trained, rel=1e-4, abs=1e-6)


CUTS = [("true", 1), ("true", 3), ("false", 1), ("false", 5)]


@pytest.mark.parametrize("name", ["dpo", "orpo", "kto"])
def test_loss_and_gradient_do_not_depend_on_packing_and_cut(name, tmp_path):
    rows = labelled_rows(7) if name == "kto" else PAIRS
    found = []
    for number, (packing, size) in enumerate(CUTS):
        (tmp_path / str(number)).mkdir()
        words = [f"data.packing={packing}", f"data.micro_batch_size={size}"]
        module, data = parts(tmp_path / str(number), name, rows, *words)
        loss, measured = mean_loss(module, data)
        found.append((loss.detach(), gradients(module, loss), torch.tensor(list(measured.values()))))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-5)


def test_packed_samples_that_are_run_apart_keep_their_order(tmp_path):
    module, data = parts(tmp_path, "dpo", PAIRS, "data.micro_batch_size=2")
    together = mean_loss(module, data)
    module.objective.runs_apart = True
    apart = mean_loss(module, data)
    torch.testing.assert_close(apart[0], together[0], **FP32)
    assert apart[1] == pytest.approx(together[1], rel=1e-4)


@pytest.mark.parametrize("words", [[], ["method=dora"], ["method=vera"], ["method=qlora"]])
def test_the_reference_is_the_base_and_no_weight_stays_changed(words, tmp_path):
    module, data = parts(tmp_path, "dpo", PAIRS, *words)
    before = trainable_state_dict(module.model)
    loss, measured = mean_loss(module, data)
    assert abs(float(loss.detach()) - math.log(2)) > 1e-4 and measured["rewards/margin"] != 0
    torch.testing.assert_close(trainable_state_dict(module.model), before, rtol=0, atol=0)


def test_reference_of_a_warm_start_is_where_it_started(tmp_path):
    first, _ = parts(tmp_path, "dpo", PAIRS)
    save_adapter(first.model, first.adapter_config, tmp_path / "adapter", "tiny")
    module, data = parts(tmp_path, "dpo", PAIRS, f"adapter.init_from={tmp_path}/adapter")
    loss, measured = mean_loss(module, data)
    assert float(loss.detach()) == pytest.approx(math.log(2), abs=1e-6) and abs(measured["rewards/margin"]) < 1e-5
    with torch.no_grad():
        for parameter in module.trainable_parameters():
            parameter.mul_(1.5)
    now = trainable_state_dict(module.model)
    loss, _ = mean_loss(module, data)
    samples = [data.training_samples[place] for place in range(len(data.training_samples))]
    policy, _ = plain_log_probabilities(module.model, samples)
    draw_adapters(module)
    start, _ = plain_log_probabilities(module.model, samples)
    margins = (policy - start).view(-1, 2) @ torch.tensor([0.1, -0.1])
    torch.testing.assert_close(loss, -F.logsigmoid(margins).mean(), **FP32)
    assert now.keys() == trainable_state_dict(module.model).keys()


def test_run_of_several_windows_is_the_same_however_it_accumulates(tmp_path):
    states = []
    for number, (size, accumulate) in enumerate([(4, 1), (1, 4), (2, 2)]):
        folder = tmp_path / str(number)
        folder.mkdir()
        words = [f"data.micro_batch_size={size}", "data.packing=false"]
        module, data = parts(folder, "kto", labelled_rows(4), *words)
        plain_trainer(max_steps=3, accumulate_grad_batches=accumulate).fit(module, datamodule=data)
        assert module.objective.distance > 0
        states.append(trainable_state_dict(module.model))
    for state in states[1:]:
        torch.testing.assert_close(state, states[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["objective=dpo", "method=full"], "objective=dpo method=full: the reference is .* use method=lora, or obj"),
        (["objective=kto", "method=full"], "objective=kto method=full: .* use method=lora$"),
        (["objective=dpo", "strategy=fsdp", "adapter.init_from=runs/x"], "objective=dpo strategy=fsdp: .* copy"),
        (["objective=dpo", "strategy=fsdp", "method=hybrid_lora"], "objective=dpo strategy=fsdp: .* copy"),
        (["objective=dpo", "objective.beta=0"], "objective.beta=0.0: must be above 0"),
        (["objective=dpo", "objective.sft_weight=-1"], "objective.sft_weight=-1.0: must be 0 or more"),
        (["objective=dpo", "objective.label_smoothing=0.5"], "objective.label_smoothing=0.5: must be at least 0 and"),
        (["objective=simpo", "objective.gamma=-1"], "objective.gamma=-1.0: must be 0 or more"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_loaded(words, message):
    with pytest.raises(ValueError, match=message):
        compose_config("train", ["model=tiny", *words])


def test_evaluate_scores_every_pair_by_the_log_probabilities_of_its_answers(tmp_path):
    """The share has the interval of a mean over pairs, and a gate that of base and adapter on the same ones."""
    path = written(tmp_path / "rows.jsonl", pair_rows(13))
    words = ["objective=dpo", "data=jsonl", f"data.train_path={path}", f"data.validation_path={path}"]
    more = ["trainer.max_steps=4", "data.packing=false", "data.max_validation_rows=13"]
    train(tiny_config(tmp_path / "run", *words, *more))
    words = [f"adapter_path={tmp_path}/run", "gate={preference_accuracy:-1}"]
    found = evaluate(compose_config("evaluate", words))
    data = validation_data(saved_config(str(tmp_path / "run")).data, load_tokenizer(ModelConfig(name="tiny")))
    model, _ = load_for_inference(str(tmp_path / "run"), None, "auto")
    samples = [sample for batch in data.val_dataloader() for sample in alone(batch)]
    for name, reference in (("base", disable_adapters(model)), ("adapter", nullcontext())):
        with torch.no_grad(), reference:
            sums, counts = (part.view(-1, 2) for part in plain_log_probabilities(model, samples))
        for metric, values in (("preference_accuracy", sums), ("preference_accuracy_per_token", sums / counts)):
            ahead = (values[:, 0] > values[:, 1]).tolist()
            assert found[name]["metrics"][metric] == pytest.approx(sum(ahead) / 13)
            assert found[name]["intervals"][metric] == pytest.approx(bootstrap([float(each) for each in ahead]))
    assert found["gate"]["preference_accuracy"]["interval"] is not None


def alone(batch):
    """Return the samples of an unpacked batch."""
    return [
        SimpleNamespace(input_ids=ids[:length].tolist(), labels=labels[:length].tolist())
        for ids, labels, length in zip(batch.input_ids, batch.labels, batch.lengths, strict=True)
    ]


def test_warm_start_from_another_method_says_which(tmp_path):
    module, _ = parts(tmp_path, "dpo", PAIRS)
    save_adapter(module.model, module.adapter_config, tmp_path / "adapter", "tiny")
    with pytest.raises(ValueError, match="adapter.init_from=.*: was made with method=lora, and dora is asked for; "):
        parts(tmp_path, "dpo", PAIRS, f"adapter.init_from={tmp_path}/adapter", "method=dora")
