"""The memory plan: against hand-counted weights, against torch's own tracker, and as the dry runs print it."""

import json
import os
import shutil
from pathlib import Path

import pytest
from conftest import Posttrain

from posttrain import configure
from posttrain.models.load import load_tokenizer
from posttrain.paths import TINY
from posttrain.planning.advice import changes, words
from posttrain.planning.machines import machine_of
from posttrain.planning.memory import MemoryPlan, plan_memory

# posttrain/tiny by hand: 3 layers of 12 × 128² + 13 × 128, 916 tokens and 512 positions of 128, and the last norm
NUMBERS = 3 * (12 * 128**2 + 13 * 128) + (916 + 512) * 128 + 2 * 128
# A and B, of rank 16, of the four linear layers: 128 -> 384, 128 -> 128, 128 -> 512, 512 -> 128
ADAPTER = 3 * 16 * (128 + 384 + 128 + 128 + 128 + 512 + 512 + 128)
PPO = ("stage=ppo", "stage.reward_functions=[x.y]", "stage.max_new_tokens=16")
VLLM = "vLLM, its own weights, keys and values"


def plan(*overrides: str, longest: int = 64, answer: int = 16) -> MemoryPlan:
    config = configure("model.model_name_or_path=posttrain/tiny", *overrides)
    return plan_memory(config, load_tokenizer(config.model)[0], longest, answer)


@pytest.mark.parametrize(
    ("overrides", "held", "trained"),
    [
        (("stage=sft",), NUMBERS, NUMBERS),
        (("stage=reward",), NUMBERS + 128, NUMBERS + 128),
        (("stage=dpo",), 2 * NUMBERS, NUMBERS),
        (("stage=dpo", "trainer.precompute_ref_log_probs=true"), NUMBERS, NUMBERS),
        (PPO, 3 * NUMBERS + 129, 2 * NUMBERS + 129),  # the reward is a function here
        (("stage=sft", "model.use_peft=true"), NUMBERS + ADAPTER, ADAPTER),
        (("stage=dpo", "model.use_peft=true"), NUMBERS + ADAPTER, ADAPTER),
    ],
    ids=["sft", "reward", "dpo", "dpo precomputed", "ppo", "sft lora", "dpo lora"],
)
def test_weights_and_optimizer_by_hand(overrides: tuple[str, ...], held: int, trained: int) -> None:
    found = plan(*overrides)
    assert sum(size for _, size in found.held) == found.parts["weights"] == 4 * held
    assert found.parts["optimizer"] == 2 * 4 * trained


def test_lora_puts_all_roles_on_one_base() -> None:
    found = plan(*PPO, "model.use_peft=true")
    assert found.parts["weights"] - 4 * NUMBERS < 0.2 * 4 * NUMBERS + 2 * 4 * ADAPTER
    assert [name for name, _ in found.held] == ["policy (frozen)", "adapter", "critic (an adapter on the same base)"]


def test_quantised_weights() -> None:
    by_name = dict(plan("model.use_peft=true", "model.load_in_4bit=true").held)
    linear = 3 * 12 * 128**2
    assert by_name["policy (frozen, in 4 or 8 bits)"] == pytest.approx(
        4 * (NUMBERS - linear) + linear * 4.5 / 8, rel=1e-6
    )


def test_the_activations_agree_with_torchs_own_tracker() -> None:
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.mem_tracker import MemTracker
    from transformers import AutoConfig, AutoModelForCausalLM
    from trl.trainer.utils import add_fused_lm_head

    from posttrain import paths

    with FakeTensorMode():
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(paths.TINY)).train()
        add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
        ids = torch.zeros((4, 64), dtype=torch.long)
        tracker = MemTracker()
        tracker.track_external(model)
        with tracker:
            model(input_ids=ids, attention_mask=ids + 1, labels=ids, fused_lm_head=True).loss.backward()
    (snapshot,) = tracker.get_tracker_snapshot("peak").values()
    theirs = {getattr(kind, "value", kind): size for kind, size in snapshot.items()}
    ours = plan("stage=sft").parts
    dynamic = sum(size for name, size in ours.items() if name not in ("weights", "optimizer"))
    assert dynamic == pytest.approx(theirs["Total"] - theirs["Parameter"], rel=0.02)


def test_a_gpu_keeps_no_attention_probabilities_and_one_tile_of_logits(tmp_path: Path) -> None:
    shutil.copytree(TINY, tmp_path / "drops")
    drops = json.loads((TINY / "config.json").read_text()) | {"attn_pdrop": 0.1}
    (tmp_path / "drops/config.json").write_text(json.dumps(drops))
    words = ("stage=sft", "precision=bf16", "stage.batch_size=8", f"model.model_name_or_path={tmp_path}/drops")
    here, there = (plan(*words, *more, longest=512) for more in ((), ("dry_run=true", "plan.device=h100")))
    # TRL's tile, of 4,096 tokens at most and 32,768 numbers of 2 bytes
    assert there.parts["logits × vocabulary"] == pytest.approx(8 * 511 * 32768 * 2, rel=0.1)
    # in each of 3 layers those of 8 sequences in 4 heads, before and after dropout, in 2 bytes
    assert here.parts["activations"] - there.parts["activations"] >= 3 * 8 * 4 * 512**2 * (2 + 2)


def test_kto_reads_the_completions_of_its_kl_term_without_gradients() -> None:
    pairs, rated = plan("stage=dpo", "stage.batch_size=4"), plan("stage=kto", "stage.batch_size=8")
    assert rated.peak == pytest.approx(pairs.peak, rel=0.02)
    assert rated.forward == pytest.approx(2 * pairs.forward, rel=0.01)
    assert rated.backward == pytest.approx(pairs.backward, rel=0.01)


def test_what_makes_it_less() -> None:
    usual = plan("stage=sft", longest=512)
    twice = plan("stage=sft", "stage.batch_size=8", longest=512)
    assert twice.parts["activations"] == pytest.approx(2 * usual.parts["activations"], rel=0.1)
    recomputed = plan("stage=sft", "trainer.gradient_checkpointing=true", longest=512)
    assert recomputed.parts["activations"] < usual.parts["activations"] / 2
    eight_bits = plan("stage=sft", "trainer.optim=adamw_8bit", longest=512)
    config = configure("model.model_name_or_path=posttrain/tiny", "stage=sft")
    alone = plan_memory(config, load_tokenizer(config.model)[0], 512, 16, peak_alone=True)
    assert (alone.peak, alone.moment) == (usual.peak, usual.moment)
    assert eight_bits.parts["optimizer"] == usual.parts["optimizer"] // 4
    long_cache = plan(*PPO[:2], "stage.max_new_tokens=448", "stage.rollout_batch_size=4096", longest=512)
    assert long_cache.moment == "while completions are generated"
    # keys and values of 4,096 answers of 512 tokens in 3 layers of 128, and four numbers for each of 916 tokens
    assert long_cache.parts["keys and values"] == 2 * 4096 * 512 * 3 * 128 * 4 + 4 * 4096 * 916 * 4


def test_vllm_in_the_same_process_takes_its_share_of_the_device() -> None:
    from trl import RLOOConfig

    share = RLOOConfig.__dataclass_fields__["vllm_gpu_memory_utilization"].default
    with_vllm = (*PPO, "stage.use_vllm=true")
    device = machine_of(configure(*with_vllm)).memory
    usual, colocated = plan(*PPO), plan(*with_vllm)
    assert colocated.parts[VLLM] == int(share * device)
    assert colocated.parts | {VLLM: 0} == usual.parts | {VLLM: 0}
    assert plan(*with_vllm, "+trainer.vllm_gpu_memory_utilization=0.5").parts[VLLM] == device // 2
    asleep = plan(*with_vllm, "+trainer.vllm_enable_sleep_mode=true")
    assert asleep.moment == "while completions are generated"
    assert asleep.parts.keys() == {"weights", "optimizer", VLLM}
    assert plan(*with_vllm, "+trainer.vllm_mode=server").peak == usual.peak
    config = configure(*with_vllm)
    assert "trainer.vllm_enable_sleep_mode=true" in [words(config, changed) for _, changed in changes(config)]


def test_a_dry_run_of_the_whole_pipeline(pipeline: Posttrain, tmp_path: Path) -> None:
    done = pipeline("recipes=quickstart", "dry_run=true", "data.max_rows=200")
    assert done.code == 0, done
    assert done.out.count("memory: about") == 4
    assert "in place of the sft model that is still to come" in done.out
    assert "holds reward model (frozen)" in done.out
    assert "holds critic (all weights)" in done.out
    assert "largest savings" not in done.out  # none of them takes a GiB
    assert not (tmp_path / "outputs").exists()


def test_too_much_is_told(posttrain: Posttrain) -> None:
    """A reward model's rows: those of a language model are planned in as many pieces as fill the memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    rows = 4 * (memory // 2**20)
    done = posttrain("recipes=quickstart/reward", "data.max_rows=60", "dry_run=true", f"stage.batch_size={rows}")
    assert done.code == 0, done
    assert "on this machine: it does not fit" in done.out
    assert "the cheapest change that fits" in done.out
