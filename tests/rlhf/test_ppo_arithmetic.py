"""PPO's arithmetic against cases worked out by hand, and the numbers that follow from a schedule."""

import math
import random

import pytest
import torch
from datasets import Dataset

from posttrain.config.stages import PPOStage
from posttrain.errors import ConfigError
from posttrain.rlhf import losses
from posttrain.rlhf.ptx import InstructionRows
from posttrain.rlhf.rollout import RolloutBuffer, join
from posttrain.rlhf.rollout_plan import RolloutPlan, episode_order, plan_rollouts, prompts_of_rollout


def close(actual: torch.Tensor, expected: list[list[float]]) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected), rtol=1e-6, atol=1e-6)


def test_advantages_and_returns() -> None:
    """γ = 0.5, λ = 0.5. First row: δ = (1 + 0.5·2 - 1, 2 + 0.5·3 - 2, 3 - 3) = (1, 1.5, 0); the second ends early."""
    rewards = torch.tensor([[1.0, 2.0, 3.0], [4.0, 9.0, 9.0]])
    values = torch.tensor([[1.0, 2.0, 3.0], [1.0, 9.0, 9.0]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    advantages, returns = losses.generalised_advantages(rewards, values, mask, gamma=0.5, lam=0.5)
    close(advantages, [[1 + 0.25 * 1.5, 1.5, 0.0], [3.0, 0.0, 0.0]])
    close(returns, [[2.375, 3.5, 3.0], [4.0, 0.0, 0.0]])


def test_returns_by_a_lambda_of_their_own() -> None:
    """As above; with λ = 1 the returns are the discounted rewards, 1 + 2/2 + 3/4, 2 + 3/2 and 3."""
    case = (torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[1.0, 2.0, 3.0]]), torch.ones(1, 3))
    advantages, returns = losses.generalised_advantages(*case, gamma=0.5, lam=0.5, value_lam=1.0)
    close(advantages, [[1.375, 1.5, 0.0]])
    close(returns, [[2.75, 3.5, 3.0]])


def test_with_gamma_and_lambda_1_the_return_is_the_sum_of_rewards() -> None:
    torch.manual_seed(0)
    rewards, values = torch.randn(4, 7), torch.randn(4, 7)
    mask = (torch.arange(7) < torch.tensor([[7], [5], [1], [3]])).long()
    _, returns = losses.generalised_advantages(rewards, values, mask, gamma=1.0, lam=1.0)
    expected = (rewards * mask).flip(1).cumsum(1).flip(1) * mask
    torch.testing.assert_close(returns, expected)


def test_the_score_lands_on_the_last_token_and_kl_on_every_one() -> None:
    kl = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 9.0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    rewards = losses.token_rewards(torch.tensor([5.0, -1.0]), kl, mask, kl_coef=2.0)
    close(rewards, [[-0.2, -0.4, 4.4], [-0.8, -2.0, 0.0]])


def test_clipped_policy_loss() -> None:
    """Ratios 1.5, 0.5 and 1.1 at clip 0.2: a gain is cut at 1.2, a loss at 0.8; 1.1 is free; the last is padding."""
    logps = torch.tensor([[math.log(1.5), math.log(0.5), math.log(1.1), 3.0]], requires_grad=True)
    advantages = torch.tensor([[2.0, -2.0, 1.0, 7.0]])
    mask = torch.tensor([[1, 1, 1, 0]])
    found = losses.policy_loss(logps, torch.zeros(1, 4), advantages, mask, clip_ratio=0.2)
    close(found.loss.detach(), [[-2.4, 1.6, -1.1, 0.0]])
    close(found.clipped, [[1.0, 1.0, 0.0, 0.0]])
    found.loss.sum().backward()
    close(logps.grad, [[0.0, 0.0, -1.1, 0.0]])  # no gradient through what is clipped
    assert float(found.approx_kl[0, 0]) == pytest.approx(0.5 - math.log(1.5))


def test_the_further_clips_change_nothing_where_they_are_not_set() -> None:
    torch.manual_seed(0)
    case = (torch.randn(3, 5), torch.randn(3, 5), torch.randn(3, 5), torch.ones(3, 5), 0.2)
    for left, right in zip(losses.policy_loss(*case), losses.policy_loss(*case, 0.2, 1e9), strict=True):
        assert torch.equal(left, right)


def test_a_clip_of_its_own_upwards() -> None:
    """Ratios 1.25, 1.5 and 0.5 at clips of 0.2 and 0.3: 1.25 is free, 1.5 is cut at 1.3, and 0.5 at 0.8 as before."""
    logps = torch.tensor([[1.25, 1.5, 0.5]]).log().requires_grad_()
    found = losses.policy_loss(logps, torch.zeros(1, 3), torch.tensor([[2.0, 2.0, -2.0]]), torch.ones(1, 3), 0.2, 0.3)
    close(found.loss.detach(), [[-2.5, -2.6, 1.6]])
    close(found.clipped, [[0.0, 1.0, 1.0]])
    found.loss.sum().backward()
    close(logps.grad, [[-2.5, 0.0, 0.0]])


def test_dual_clip() -> None:
    """Bound 3: a ratio of 5 with advantage -2 costs 6 in place of 10, one of 2 costs 4; +2 keeps the plain clip."""
    logps = torch.tensor([[5.0, 2.0, 5.0, 5.0]]).log().requires_grad_()
    advantages, mask = torch.tensor([[-2.0, -2.0, 2.0, -2.0]]), torch.tensor([[1, 1, 1, 0]])
    found = losses.policy_loss(logps, torch.zeros(1, 4), advantages, mask, 0.2, dual_clip=3.0)
    close(found.loss.detach(), [[6.0, 4.0, -2.4, 0.0]])
    close(found.clipped, [[1.0, 0.0, 1.0, 0.0]])
    found.loss.sum().backward()
    close(logps.grad, [[0.0, 4.0, 0.0, 0.0]])


def test_clipped_value_loss() -> None:
    """Old values 0, clip 0.2: 1.0 moves too far towards 1, so 0.2 is judged; 0.1 is free."""
    values = torch.tensor([[1.0, 0.1, 5.0]])
    returns = torch.tensor([[1.0, 0.3, 9.0]])
    mask = torch.tensor([[1, 1, 0]])
    clipped = losses.value_loss(values, torch.zeros(1, 3), returns, mask, cliprange_value=0.2)
    close(clipped, [[0.5 * 0.8**2, 0.5 * 0.2**2, 0.0]])
    close(losses.value_loss(values, torch.zeros(1, 3), returns, mask, None), [[0.0, 0.02, 0.0]])


def test_kl_estimators() -> None:
    """Exact over two outcomes with π = (3/4, 1/4), π_ref = (1/2, 1/2): both have KL(π‖π_ref) as their mean."""
    policy, reference = torch.tensor([0.75, 0.25]), torch.tensor([0.5, 0.5])
    exact = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    for kind in ("k1", "k3"):
        each = losses.kl_estimate(policy.log(), reference.log(), kind)
        assert float((policy * each).sum()) == pytest.approx(exact, abs=1e-6)
    k3 = losses.kl_estimate(policy.log(), reference.log(), "k3")
    close(k3[None], [[0.5 / 0.75 - 1 + math.log(1.5), 1.0 + math.log(0.5)]])
    assert (k3 >= 0).all()


def test_whitening() -> None:
    values = torch.tensor([[1.0, 2.0], [3.0, 99.0]])
    mask = torch.tensor([[1, 1], [1, 0]])
    over = losses.moments(values, mask)
    assert over.tolist() == [6.0, 14.0, 3.0]
    close(losses.whiten(values, mask, over), [[-1.0, 0.0], [1.0, 0.0]])
    close(losses.whiten(values, mask, over, shift_mean=False), [[1.0, 2.0], [3.0, 0.0]])
    halves = [losses.moments(values[row : row + 1], mask[row : row + 1]) for row in (0, 1)]
    close(losses.whiten(values, mask, halves[0] + halves[1]), [[-1.0, 0.0], [1.0, 0.0]])  # as over two processes


def test_importance_weights_of_tokens_that_another_policy_has_sampled() -> None:
    """π = 1/2 at each token; μ = 1/4, 1/8 and 1 make ratios of 2, 4 and 1/2, of which a cap of 3 cuts the second."""
    sampled = torch.tensor([[0.25, 0.125, 1.0, 0.5]]).log()
    weights = losses.importance_weights(torch.full((1, 4), 0.5).log(), sampled, torch.tensor([[1, 1, 1, 0]]), cap=3.0)
    close(weights, [[2.0, 3.0, 0.5, 0.0]])


def test_of_instruction_rows_the_tokens_of_completions_are_learned() -> None:
    """Of ids 1 2 3 the last two, of 4 5 the last, of 6 7 8 9 two apart; a text's first token has nothing before it."""
    rows = Dataset.from_dict({"input_ids": [[1, 2, 3], [4, 5], [6, 7, 8, 9]], "spans": [[1, 3], [0, 2], [1, 2, 3, 4]]})
    plan = RolloutPlan(9, 6, 3, mini_batches=2, passes=1, accumulation=1, batch_size=3, rollouts_per_epoch=1)
    source = InstructionRows(rows, padding=0, seed=1, plan=plan)
    shares = [source.batch(0, part, 2, torch.device("cpu")) for part in (0, 1)]
    learned = [ids.flatten()[picked].tolist() for (ids, _, _, picked), _ in shares]
    assert sorted(token for each in learned for token in each) == [2, 3, 5, 7, 9]
    assert [tokens for _, tokens in shares] == [5, 5]
    assert all((ids != 0).equal(mask.bool()) for (ids, mask, _, _), _ in shares)


def test_explained_variance() -> None:
    mask = torch.tensor([[1, 1, 1, 0]])
    returns = torch.tensor([[1.0, 2.0, 3.0, 0.0]])

    def explained(values: torch.Tensor) -> float:
        return losses.explained_variance(losses.moments(returns - values, mask), losses.moments(returns, mask))

    assert explained(returns) == 1
    assert explained(torch.full((1, 4), 7.0)) == pytest.approx(0, abs=1e-5)
    assert explained(-returns) == pytest.approx(-3, abs=1e-5)


def test_kl_controllers() -> None:
    fixed = losses.KLController(0.1, adaptive=False, target=6.0, horizon=100.0)
    fixed.update(50.0, 64)
    assert fixed.coef == 0.1
    moving = losses.KLController(0.1, adaptive=True, target=6.0, horizon=100.0)
    moving.update(50.0, 10)
    assert moving.coef == pytest.approx(0.1 * (1 + 0.2 * 10 / 100))
    moving.update(6.0, 10)
    assert moving.coef == pytest.approx(0.102)
    moving.update(5.4, 10)
    assert moving.coef == pytest.approx(0.102 * (1 - 0.1 * 10 / 100))


def stage(**changes: object) -> PPOStage:
    return PPOStage(**({"rollout_batch_size": 8, "num_mini_batches": 2, "batch_size": 2, "ppo_epochs": 3} | changes))


def test_the_schedule_divides_the_work() -> None:
    plan = plan_rollouts(stage(), prompts=20, processes=1)
    assert (plan.accumulation, plan.steps_per_rollout, plan.micro_steps_per_rollout) == (2, 6, 12)
    assert plan.rollouts_per_epoch == 3
    assert plan_rollouts(stage(), prompts=20, processes=2).accumulation == 1
    with pytest.raises(ConfigError, match=r"× 3 processes; set stage.rollout_batch_size=12 or a smaller"):
        plan_rollouts(stage(), prompts=20, processes=3)


@pytest.mark.parametrize("prompts", [3, 8, 20])
def test_no_prompt_is_left_out_and_a_rollout_is_a_function_of_its_number(prompts: int) -> None:
    plan = plan_rollouts(stage(), prompts=prompts, processes=1)
    stream = [index for number in range(40) for index in prompts_of_rollout(plan, 7, number)]
    passes = len(stream) // prompts
    for number in range(passes):
        assert sorted(stream[number * prompts : (number + 1) * prompts]) == list(range(prompts))
    assert len({tuple(stream[number * prompts :][:prompts]) for number in range(passes)}) > 1 or prompts == 1
    assert prompts_of_rollout(plan, 7, 3) == stream[24:32]
    assert prompts_of_rollout(plan, 8, 3) != stream[24:32]


@pytest.mark.parametrize("prompts", [1, 3, 7, 8, 100])
def test_a_pass_is_the_list_of_prompts_shuffled_by_seed_and_number(prompts: int) -> None:
    """As defined: the shuffled lists one behind the other, of which a rollout takes the next eight."""
    passes = []
    for number in range(math.ceil(240 / prompts)):
        order = list(range(prompts))
        random.Random(f"prompts 7 {number}").shuffle(order)
        passes += order
    plan = plan_rollouts(stage(), prompts=prompts, processes=1)
    for rollout in (0, 1, 29, 2, 28, 12, 13):  # a resume begins anywhere
        assert prompts_of_rollout(plan, 7, rollout) == passes[8 * rollout : 8 * rollout + 8]


def test_each_pass_takes_every_episode_once_in_an_order_of_its_own() -> None:
    plan = RolloutPlan(20, 64, 64, 2, 3, 2, 2, 3)
    orders = [episode_order(plan, 7, 0, ppo_epoch, 0) for ppo_epoch in range(3)]
    assert all(sorted(order) == list(range(64)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3


def test_the_buffer_is_cut_to_what_it_holds() -> None:
    prompt_mask = torch.tensor([[0, 0, 1], [1, 1, 1], [0, 1, 1]])
    completion_mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]])
    numbers = torch.arange(12.0).view(3, 4)
    buffer = RolloutBuffer(
        prompt_ids=torch.arange(9).view(3, 3),
        prompt_mask=prompt_mask,
        completion_ids=torch.arange(12).view(3, 4),
        completion_mask=completion_mask,
        logps=numbers,
        values=torch.empty(0),
        advantages=numbers,
        returns=numbers,
    )
    part = buffer.take([2, 1])
    assert part.prompt_ids.tolist() == [[6, 7, 8], [3, 4, 5]]
    assert part.completion_ids.tolist() == [[8, 9], [4, 5]]
    assert part.logps.tolist() == [[8.0, 9.0], [4.0, 5.0]]
    assert part.tokens == 3
    assert buffer.take([0]).prompt_ids.tolist() == [[2]]
    mask, positions = join(part.prompt_mask, part.completion_mask)
    assert mask.tolist() == [[0, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
    assert positions.tolist() == [[0, 0, 1, 2, 3], [0, 1, 2, 3, 3]]
