"""Table of pruning methods; a new method is one entry in `METHODS`."""

from __future__ import annotations

from dataclasses import replace

from ..scores.starts import AUTO, HYDRA, ScoreSettings
from ..values import NAME, require
from .magnitude_schedules import AlternatingCompression, GradualMagnitude, RigL, by_lamp
from .mask_schedules import GradualSparsity, LearnedMasks, MaskSchedule, ScoredMasks, Unmasked
from .preparations import Preparation, RecalibrateBatchNorm, Reconstruct, Rewind, Select
from .stage import Method, RoleSettings, Rounds, Stage

SCORES = frozenset({"scores", "head"})
WEIGHTS = frozenset({"weights", "head"})
PROMPT = frozenset({"prompt"})
# Scores learned or measured under a random head mean nothing, so a new head is trained first, on the dense backbone.
WARM_UP = Stage("warm_up", frozenset({"head"}), "warm_up", masks=ScoredMasks(), sparsity=0.0)
SEARCH = Stage("search", SCORES, "search", masks=LearnedMasks())
TUNE = Stage("tune", WEIGHTS, "tune")
DENSE = replace(TUNE, masks=Unmasked(), batches="mixed")
PROMPTED_SEARCH = replace(SEARCH, roles=SCORES | PROMPT, batches="prompted")
PROMPTED_TUNE = replace(TUNE, roles=WEIGHTS | PROMPT, batches="prompted")
PROMPT_ALONE = Stage("prompt", PROMPT, "tune", batches="prompted", eval_backbone=True)
# The sparsity rises from zero, so that scores are learned on a network that still works.
RISING_SEARCH = replace(SEARCH, masks=LearnedMasks(gradual=GradualSparsity(), scores=ScoreSettings(HYDRA, AUTO)))
# Scores and weights train together; the sparsity rises for three quarters of the steps, and the mask moves to the end,
# which did better on validation than a mask that is fixed once the sparsity has risen.
JOINT = Stage(
    "joint",
    SCORES | WEIGHTS,
    "tune",
    masks=LearnedMasks(gradual=GradualSparsity(), scores=ScoreSettings("lamp", AUTO)),
    batches="mixed",
)
# The head of a model that is pruned already, on the backbone as it is.
PRUNED_WARM_UP = replace(WARM_UP, masks=MaskSchedule(), sparsity=None)


def prune_and_tune(*before: Preparation) -> tuple[Stage, ...]:
    """Select a mask once, then tune the weights that are left."""
    return WARM_UP, replace(TUNE, before=before)


def prune_only(*before: Preparation) -> tuple[Stage, ...]:
    """Select a mask once and train nothing but a new head, before it."""
    return WARM_UP, Stage("prune", frozenset(), "tune", before)


def with_teacher(stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
    """Put a stage that tunes the dense reference, as a teacher, before the others, which start where it started."""
    count = next(index for index, stage in enumerate(stages) if stage.length != "warm_up")
    first = replace(stages[count], before=(Rewind(), *stages[count].before))
    return *stages[:count], replace(DENSE, name="teacher", length="teacher"), first, *stages[count + 1 :]


MAGNITUDE = Select("magnitude", needs_data=False)
METHODS: dict[str, Method] = {
    "dense": Method(
        "Reference: all weights are tuned on the batches of VPNs without its prompt, nothing is pruned.",
        (WARM_UP, DENSE),
    ),
    # Learned masks
    "vpns": Method(
        "Learn masks and a visual prompt together, then tune weights and prompt (arXiv 2312.01397).",
        (WARM_UP, PROMPTED_SEARCH, PROMPTED_TUNE),
        uses_prompt=True,
    ),
    "hydra": Method(
        "Learn masks alone with the optimizer of VPNs, then tune the weights (arXiv 2002.10509).",
        (WARM_UP, SEARCH, TUNE),
    ),
    "vpns_gradual": Method(
        "VPNs with a sparsity that rises from zero during its search.",
        (WARM_UP, replace(RISING_SEARCH, roles=PROMPTED_SEARCH.roles, batches="prompted"), PROMPTED_TUNE),
        uses_prompt=True,
    ),
    "hydra_gradual": Method(
        "The loop of vpns_gradual without a prompt.",
        (WARM_UP, replace(RISING_SEARCH, batches="mixed"), replace(TUNE, batches="mixed")),
    ),
    "vpns_joint": Method(
        "Learn masks, weights and a visual prompt together in one stage, while the sparsity rises from zero.",
        (WARM_UP, replace(JOINT, roles=JOINT.roles | PROMPT, batches="prompted")),
        uses_prompt=True,
    ),
    "hydra_joint": Method(
        "The loop of vpns_joint without a prompt.",
        (WARM_UP, JOINT),
    ),
    "hydra_sgd": Method(
        "HYDRA with the optimizer it was published with: scores by SGD at 0.1 (arXiv 2002.10509).",
        (WARM_UP, replace(SEARCH, settings={"scores": RoleSettings("sgd", 0.1, "cosine")}), TUNE),
    ),
    "bip": Method(
        "Bi-level pruning: weights and scores are stepped in turn, scores with the implicit gradient (arXiv "
        "2210.04092).",
        (
            WARM_UP,
            replace(
                SEARCH,
                roles=SCORES | WEIGHTS,
                length="tune",
                # Twice each, so that both meet unaugmented and augmented batches where these alternate.
                turns=(WEIGHTS, WEIGHTS, frozenset({"scores"}), frozenset({"scores"})),
                masks=LearnedMasks(implicit_gradient=1e-4),
            ),
        ),
    ),
    "movement": Method(
        "Movement pruning: scores gather -weight * gradient while weights train, sparsity rises (arXiv 2005.07683).",
        (
            WARM_UP,
            replace(
                SEARCH,
                roles=SCORES | WEIGHTS,
                length="tune",
                masks=LearnedMasks(scope="layer", signed=True, gradual=GradualSparsity(start=0.1)),
            ),
        ),
    ),
    "platon": Method(
        "PLATON: scores bound the importance |weight * gradient| from above while weights train (arXiv 2206.12562).",
        (
            WARM_UP,
            replace(
                SEARCH,
                roles=SCORES | WEIGHTS,
                length="tune",
                settings={"scores": RoleSettings("platon", 1.0, "constant")},
                masks=LearnedMasks(signed=True, gradual=GradualSparsity(start=0.1)),
            ),
        ),
    ),
    # Magnitude
    "omp": Method(
        "One-shot magnitude pruning of the pretrained weights, ranked by the model's scope, then tuning.",
        prune_and_tune(MAGNITUDE),
    ),
    "omp_layer": Method(
        "One-shot magnitude pruning with the same sparsity in every layer, then tuning.",
        prune_and_tune(replace(MAGNITUDE, scope="layer")),
    ),
    "lamp": Method(
        "One-shot pruning by layer-adaptive magnitude, ranked globally, then tuning (arXiv 2010.07611).",
        prune_and_tune(Select("lamp", scope="global", needs_data=False)),
    ),
    "depgraph": Method(
        "One-shot pruning by squared magnitude, with the weights of every layer scaled alike (arXiv 2301.12900), then "
        "tuning; for channels.",
        prune_and_tune(Select("group_magnitude", needs_data=False)),
    ),
    "omp_tuned": Method(
        "Magnitude of weights tuned densely first; the mask is put on the pretrained weights, then tuned, as in the "
        "paper's comparison.",
        (
            WARM_UP,
            replace(TUNE, name="dense", masks=Unmasked(), length="search"),
            replace(TUNE, before=(MAGNITUDE, Rewind())),
        ),
    ),
    "imp": Method(
        "Iterative magnitude pruning: at most 20 % of the weights a round, rewound to the pretrained ones (arXiv "
        "1803.03635, 2012.06908).",
        (
            WARM_UP,
            Rounds(replace(TUNE, name="round", length="search", before=(MAGNITUDE, Rewind()))),
            replace(TUNE, before=(MAGNITUDE, Rewind())),
        ),
    ),
    "imp_lr_rewinding": Method(
        "Iterative magnitude pruning that continues from the trained weights and restarts the learning rate (arXiv "
        "2003.02389).",
        (
            WARM_UP,
            Rounds(replace(TUNE, name="round", length="search", before=(MAGNITUDE,))),
            replace(TUNE, before=(MAGNITUDE,)),
        ),
    ),
    "gmp": Method(
        "Gradual magnitude pruning while the weights train, along a cubic curve (arXiv 1710.01878).",
        (WARM_UP, replace(TUNE, masks=GradualMagnitude())),
    ),
    "gmp_teacher": Method(
        "Gradual magnitude pruning that learns from the dense reference of the same seed (arXiv 2210.06384).",
        (WARM_UP, replace(TUNE, masks=GradualMagnitude())),
        teacher="self",
    ),
    "gmp_lamp": Method(
        "Gradual pruning ranked by layer-adaptive magnitude while the weights train (arXiv 1710.01878, 2010.07611).",
        (WARM_UP, replace(TUNE, masks=GradualMagnitude(ranking=by_lamp, scope="global"))),
    ),
    "acdc": Method(
        "AC/DC: dense and compressed phases in turn (arXiv 2106.12379).",
        (WARM_UP, replace(TUNE, masks=AlternatingCompression())),
    ),
    "rigl": Method(
        "RigL from the magnitude mask: smallest weights dropped, largest gradients grown (arXiv 1911.11134).",
        (WARM_UP, replace(TUNE, before=(MAGNITUDE,), masks=RigL())),
    ),
    # One-shot scores
    "snip": Method(
        "One-shot pruning by |weight * gradient| of the task's loss, then tuning (arXiv 1810.02340).",
        prune_and_tune(Select("snip")),
    ),
    "grasp": Method(
        "One-shot pruning that keeps the gradient flow, weight * Hessian-gradient product, then tuning (arXiv "
        "2002.07376).",
        prune_and_tune(Select("grasp")),
    ),
    "woodfisher": Method(
        "Block-wise empirical Fisher scores, in four rounds, then tuning (WoodFisher, arXiv 2004.14340).",
        prune_and_tune(Select("woodfisher", rounds=4)),
    ),
    "synflow": Method(
        "Synaptic flow in 100 rounds, without data, then tuning (arXiv 2006.05467).",
        prune_and_tune(Select("synflow", rounds=100)),
    ),
    "random": Method(
        "Random masks with the same sparsity in every layer, then tuning.",
        prune_and_tune(Select("random", scope="layer", needs_data=False, seeded=True)),
    ),
    "random_erk": Method(
        "Random masks with Erdos-Renyi-kernel densities, then tuning (arXiv 1911.11134).",
        prune_and_tune(Select("random", scope="erk", needs_data=False, seeded=True)),
    ),
    # Calibration only
    "wanda": Method(
        "|weight| times the norm of its input, compared within each output, no training (arXiv 2306.11695).",
        prune_only(Select("wanda", scope="row"), RecalibrateBatchNorm()),
    ),
    "sparsegpt": Method(
        "Layer by layer, the kept weights corrected for the pruned ones, no training (arXiv 2301.00774).",
        prune_only(Reconstruct(), RecalibrateBatchNorm()),
    ),
    # On a new task, under the mask of a pruned model
    "tune": Method(
        "Tune the kept weights under the mask as it is, after a new head.",
        (PRUNED_WARM_UP, TUNE),
        needs_pruned=True,
    ),
    "linear_probe": Method(
        "Train a new head alone on the backbone as it is pruned; BatchNorm statistics stay.",
        (Stage("probe", frozenset({"head"}), "tune", eval_backbone=True),),
        backbone={"new_head": True},
        needs_pruned=True,
    ),
    "prompt_only_new_head": Method(
        "Train a new head, then a prompt alone, on the model as it is pruned; BatchNorm statistics stay.",
        (replace(PRUNED_WARM_UP, eval_backbone=True), PROMPT_ALONE),
        uses_prompt=True,
        needs_pruned=True,
    ),
    # Control
    "vpns_zero_prompt": Method(
        "Control: the loop of VPNs with the prompt held at zero, that is, without it.",
        (WARM_UP, replace(SEARCH, batches="mixed"), replace(TUNE, batches="mixed")),
        is_control=True,
    ),
}
WITH_PROMPT = "+prompt"
MASK_ALONE = ":mask"


def get_method(name: str) -> Method:
    """Look up a method by its name.

    `"<name>+prompt"` is the method with a prompt in its last stage, `"<name>:mask"` the part that finds the mask.

    Raises:
        ValueError: there is none, or it has a prompt already, or trains nothing in its last stage, or finds no mask.
    """
    require("method", name, NAME)
    if name.endswith(MASK_ALONE):
        return _mask_alone(name.removesuffix(MASK_ALONE))
    base = name.removesuffix(WITH_PROMPT)
    if base not in METHODS:
        raise ValueError(
            f"`method` is {name!r}; expected one of {', '.join(METHODS)}, or one of them + '{WITH_PROMPT}'."
        )
    return METHODS[base] if base == name else _with_prompt(base)


def _with_prompt(name: str) -> Method:
    """Add a prompt to the last stage, the paper's "VP added to other pruners"."""
    method = METHODS[name]
    *first, last = method.stages
    if method.uses_prompt or isinstance(last, Rounds) or "weights" not in last.roles or last.batches == "augmented":
        raise ValueError(
            f"`method` is '{name}{WITH_PROMPT}', but "
            + (f"{name} has a prompt already." if method.uses_prompt else f"the last stage of {name} takes none.")
        )
    # Where roles take turns, the prompt belongs to the scores.
    turns = tuple(turn | PROMPT if "scores" in turn else turn for turn in last.turns)
    last = replace(last, roles=last.roles | PROMPT, batches="prompted", turns=turns)
    return replace(
        method,
        description=f"{method.description.removesuffix('.')}, with a prompt trained in the last stage.",
        stages=(*first, last),
        uses_prompt=True,
    )


def _mask_alone(name: str) -> Method:
    """Drop the tuning after the mask is final; weights stay or are rewound, as the method says."""
    method = get_method(name)
    *first, last = method.stages
    if method.needs_pruned or name == "dense" or name.endswith(WITH_PROMPT):
        raise ValueError(f"`method` is '{name}{MASK_ALONE}', but {name} finds no mask of its own.")
    if isinstance(last, Rounds) or last.masks.moves or last.masks.state != "frozen":
        # Its mask moves until the end.
        return method
    stages = (*first, replace(last, name="prune", roles=frozenset())) if last.before else tuple(first)
    method = replace(method, description=f"The mask of: {method.description}", stages=stages)
    # Without data it looks at the weights of the backbone alone, and a head would be trained for nothing.
    return method if method.needs_data else replace(method, stages=stages[1:])
