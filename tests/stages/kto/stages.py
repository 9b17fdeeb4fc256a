@dataclass
class KTOStage(StageConfig):
    """Kahneman-Tversky optimisation."""

    beta: float = key(above=0, below=1e3, trl="beta")


@dataclass
class RatingColumns(Columns):
    """The names that the documented columns have in the source."""

    prompt: str = key()
    completion: str = key()
    label: str = key()


RATINGS = DataFormat("ratings", '{"prompt": "…", "completion": "…", "label": true}', RatingColumns)
KTO = StageSpec(
    name="kto",
    schema=KTOStage,
    data_format=RATINGS,
    follows=("sft",),
    is_classifier=False,
    trl_config=("kto_config.py", "KTOConfig"),
    reserved={"label_smoothing_factor": "KTO's loss has none"},
    check_trainer=no_problems,
    title="KTO",
    tag="kto",
    unit="rows",
    sequences_per_row=1,
    headline="eval_loss",
    objective="eval_loss",
    shown=("eval_loss", "ended_by_eos"),
    swept=("eval_loss", "train_loss"),
    charts=(("loss", "eval_loss"),),
    frontier=(),
)
