"""The sentences: what counts as better and worse, and on what grounds."""

from pathlib import Path

from posttrain.metrics.comparison import differences, paired
from posttrain.metrics.several import Run, groups
from posttrain.metrics.summary import UNTESTED, Trained, of_points, sentences

SFT = Trained("sft", "sft", "gpt2", 450, 20.0, ["data/rows.jsonl"], "", {"eval_loss_before": 6.9, "eval_loss": 0.26})
PPO = Trained("ppo", "ppo", "outputs/demo/sft", 450, 1.0, ["prompts.jsonl"], "the reward model of reward", {})


def test_wins_are_counted_by_scores_that_were_not_trained_on_and_by_the_reward_apart() -> None:
    right, wrong = [1.0] * 20, [0.0] * 20
    policies = [
        {"policy": "outputs/demo/sft", "against_first": {}},
        {
            "policy": "outputs/demo/ppo",
            "against_first": {
                "reward": paired([2.0] * 20, right),
                "correct": paired(wrong[:8] + right[8:], right),
                "style": paired(right[:10] + wrong[10:], wrong),
                "short": paired(right, right),
            },
        },
    ]
    policies.append({"policy": "best of 4 of outputs/demo/sft", "against_first": {"reward": paired([3.0] * 20, right)}})
    trained, better, worse, same = map(str, sentences([SFT, PPO], list(differences(policies))))
    assert trained == (
        "Trained: gpt2 by sft on 450 rows of rows.jsonl, 20 epochs; "
        "ppo on 450 prompts of prompts.jsonl, 1 epoch, rewarded by the reward model of reward."
    )
    loss, style, reward = better.removeprefix("Better: ").split("; ")
    assert loss == f"sft: held-out loss 6.900 → 0.2600 ({UNTESTED})"  # two means alone
    tested = "(10 better, 0 worse of 20 prompts, p = 0.002), wins 75% (53% to 89%) against sft"
    assert style == f"ppo: style 0.000 → 0.500 {tested}"
    assert reward.startswith("ppo: the reward that is optimised 1.000 → 2.000")
    assert worse.startswith("Worse: ppo: correct 1.000 → 0.600 (0 better, 8 worse")
    assert same.startswith("No difference seen: ppo: short 1.000")


def test_a_stage_alone_is_judged_by_its_own_held_out_numbers() -> None:
    def judged(stage: str, **metrics: float) -> list[str]:
        known = Trained(stage, stage, "gpt2", 9, None, ["a"], "", metrics)
        return [each.title for each in sentences([known], [])[1:] for part in each.parts if stage in part]

    assert judged("sft", eval_loss=1.0, eval_loss_before=2.0) == ["Better"]
    assert judged("sft", eval_loss=2.0, eval_loss_before=1.0) == ["Worse"]
    assert judged("sft") == []
    assert judged("reward", accuracy=0.7, accuracy_low=0.6, accuracy_high=0.8) == ["Better"]
    assert judged("dpo", accuracy=0.3, accuracy_low=0.2, accuracy_high=0.4) == ["Worse"]
    # chance is within the interval
    assert judged("dpo", accuracy=0.55, accuracy_low=0.45, accuracy_high=0.65) == ["No difference seen"]
    fell = {"gold/correct": 0.2, "gold/correct_before": 0.9, "gold/correct_better": 0, "gold/correct_worse": 9}
    assert judged("ppo", reward=1.0, reward_before=0.0, reward_better=9, reward_worse=0, **fell) == ["Better", "Worse"]


def test_a_stage_that_is_evaluated_beside_others_keeps_its_own_headline() -> None:
    own = {"accuracy": 0.1, "accuracy_low": 0.0, "accuracy_high": 0.3, "eval_rows": 1}
    dpo = Trained("dpo", "dpo", "sft", 9, None, ["a"], "", own)
    by = {"reward": paired([2.0], [1.0])}
    found = differences([{"policy": "sft", "against_first": {}}, {"policy": "dpo", "against_first": by}])
    _, better, worse, same = map(str, sentences([SFT, dpo], list(found)))
    assert "reward" not in better
    assert worse == "Worse: dpo: accuracy 10.0% (0.0% to 30.0%) on 1 pair, where chance is 50%."
    assert same.startswith("No difference seen: dpo: the reward that is optimised 1.000 → 2.000")


def test_a_sweep_names_its_best_and_its_worst_point_by_the_mean_of_its_seeds() -> None:
    scores = ((0.1, 1, 0.2), (0.1, 2, 0.6), (0.2, 1, 0.5), (0.2, 2, 0.5), (0.3, 1, 0.1))
    runs = [Run("r", {"kl": kl, "seed": seed}, {"penalised_reward": by}, Path()) for kl, seed, by in scores]
    trained, best, worst = map(str, of_points(PPO, groups(runs)))
    assert "5 times by ppo on 450 prompts" in trained
    assert best.startswith("Best: kl=0.2, ")
    assert worst.startswith("Worst: r, ")
    losses = [Run(f"point {n}", {"lr": n}, {"eval_loss": n}, Path()) for n in (1, 2)]
    assert of_points(SFT, groups(losses))[1].parts[0].startswith("point 1, ")
