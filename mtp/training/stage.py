"""A stage: what it trains, on which data, for how long. A run is a list of stages.

A stage trains on solved `examples` of the task or on the policy's own `rollouts`; the one that is
set determines the kind of the stage.
"""

from dataclasses import dataclass, field

from ..common.bounds import bounded
from ..modeling.phases import MODES
from ..rollouts.advantage import ADVANTAGES, Advantage, AdvantageConfig, batch_std
from ..rollouts.reward import RewardConfig
from .objectives import ObjectiveConfig
from .optimizers import OptimizerConfig


def check_unset(stage: "StageConfig", key: str, *names: str) -> None:
    """Raises ValueError naming a key that has no effect in a stage of this kind."""
    for name in names:
        value = getattr(stage, name)
        for setting, default in vars(type(value)()).items():
            if getattr(value, setting) != default:
                raise ValueError(
                    f"{key}.{name}.{setting} must be left at {default!r} in a stage that is "
                    f"{stage.kind}, got {getattr(value, setting)!r}"
                )


@dataclass(kw_only=True)
class AnchorsConfig:
    """Anchors of the head in a text that it did not help to write."""

    num_anchors: int = bounded(0, at_least=0)
    """Number of anchors sampled per sequence of solved examples, slow or verified rollouts, 0 for
    all. Fewer save memory and time."""
    block_anchors: bool = False
    """Train the head only where a pass would begin at decoding time, about one position in K + 1.
    False: every position of a fast phase is an anchor."""


@dataclass(kw_only=True)
class ExamplesConfig(AnchorsConfig):
    """Solved examples of the task, which a supervised stage trains on."""

    batch_size: int = bounded(0, at_least=0)
    """Number of sequences per step, over all processes; 0: the stage trains on rollouts."""
    length_window: int = bounded(0, at_least=0, at_most=100_000)
    """Number of steps whose examples are sorted by length together, for less padding: a step then
    has texts of similar length. 1 sorts within each step, for its micro-batches; 0: no sorting."""


@dataclass(kw_only=True)
class RolloutsConfig(AnchorsConfig):
    """The policy's own rollouts, which an RL stage trains on."""

    num_prompts: int = bounded(0, at_least=0)
    """Number of prompts per step over all processes, P; 0: the stage trains on solved examples."""
    group_size: int = bounded(16, at_least=1)
    """Number of rollouts per prompt, G."""
    mode: str = "fast"
    """Mode of the rollouts. `fast`: the head's tokens are executed. `slow`: main writes alone, and
    the head's rows score main's tokens (an auxiliary loss). `verified`: as `slow`, in fewer passes:
    the head drafts and main decides, which leaves main's distribution as it is."""
    num_minibatches: int = bounded(1, at_least=1)
    """Number of optimizer steps per batch of rollouts, each on its own share of the prompts."""
    num_epochs: int = bounded(1, at_least=1)
    """Number of epochs over each batch of rollouts; anchors are resampled in each."""
    recompute_old: bool = False
    """Recompute old log-probabilities with one extra forward pass before the update, instead of
    using the sampler's. `objective.policy.correction_cap` then corrects for their difference."""
    drop_uninformative: bool = False
    """Exclude groups whose outcomes all agree from the update."""
    max_rounds: int = bounded(1, at_least=1)
    """Maximum number of rounds of `num_prompts` prompts each. With `drop_uninformative`, sampling
    continues until `num_prompts` groups are informative (DAPO's dynamic sampling)."""
    num_solved: int = bounded(0, at_least=0)
    """Number of solved examples mixed into each optimizer step over all processes, for main_ce and
    head_ce (supervised replay)."""

    lag: int | None = bounded(None, at_least=0, at_most=1)
    """Rollouts by another process, which Ray starts. 1: it samples the next step's rollouts while
    this step's train the model, so that their weights are one step old. 0: this step's, which are
    the same as without it. null: this process samples."""

    def validate(self, key: str) -> None:
        """Raises ValueError naming the key of an impossible value."""
        if self.mode not in MODES:
            raise ValueError(f"{key}.mode must be fast, slow or verified, got {self.mode!r}")
        if self.num_prompts % self.num_minibatches:
            raise ValueError(
                f"{key}.num_minibatches must divide {key}.num_prompts={self.num_prompts}, got "
                f"{self.num_minibatches}"
            )
        if self.lag is not None and self.max_rounds > 1:
            raise ValueError(
                f"{key}.max_rounds must be 1 with {key}.lag={self.lag}, got {self.max_rounds}: the "
                "number of rounds follows from rewards, and the rollouts are asked for before"
            )
        if self.max_rounds > 1 and not self.drop_uninformative:
            raise ValueError(
                f"{key}.max_rounds={self.max_rounds} samples until enough groups are informative; "
                f"set {key}.drop_uninformative=true"
            )


@dataclass(kw_only=True)
class OptimizersConfig:
    """The optimizers of a stage, by emitter."""

    main: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer of main's parameters."""
    head: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer of the head's parameters."""


@dataclass(kw_only=True)
class StageConfig:
    """One stage of a run."""

    steps: int = bounded(100, at_least=0)
    """Number of optimizer steps; a stage of 0 steps is left out of the run."""
    examples: ExamplesConfig = field(default_factory=ExamplesConfig)
    """Solved examples of the task, if their `batch_size` is above 0."""
    rollouts: RolloutsConfig = field(default_factory=RolloutsConfig)
    """The policy's own rollouts, if their `num_prompts` is above 0."""
    train_main: bool = True
    """Train main's parameters."""
    train_head: bool = True
    """Train the head's parameters."""
    channel_gradient: float = bounded(1.0, at_least=0)
    """Scale of the head's gradient on main: 1 opens the channel, 0 closes it."""
    channel_ramp_steps: int = bounded(0, at_least=0)
    """Number of steps before the scale is `channel_gradient`, to which it rises linearly; 0:
    constant."""
    logits_detach: bool = False
    """Detach the head's gradient from an output matrix that it shares with main. The channel
    through the taps is unchanged, see `channel_gradient`."""
    reference: str = "previous"
    """Frozen model that reference_kl and preserve compare with: main at the end of the `previous`
    stage, the `first` or an earlier one by name; `start`: the model that the run began from."""
    micro_batch_size: int = bounded(0, at_least=0)
    """Number of sequences per forward and backward; 0: all sequences of a step at once."""
    gradient_checkpointing: bool = False
    """Recompute main's layers in the backward: less memory, about a third more time."""
    optimizers: OptimizersConfig = field(default_factory=OptimizersConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    stop_accuracy: float = bounded(0.0, at_least=0, at_most=1)
    """Early-stopping threshold on fast-mode accuracy, measured on the next unseen training
    problems. 0 disables it. Held-out problems are never used."""
    stop_every: int = bounded(20, at_least=1)
    """Number of steps between two comparisons with `stop_accuracy`."""
    evaluate_every: int = bounded(0, at_least=0)
    """Number of steps between two evaluations on a smaller set; 0 evaluates at the end only."""
    gradient_split_every: int = bounded(0, at_least=0)
    """Number of steps between two records of how main's policy gradient divides into that of its
    own tokens and that of the head's (`main/grad_norm_own`, `main/grad_norm_channel`,
    `main/grad_cosine`). Each costs two forward and two backward passes more, about as much as two
    updates, and changes nothing in training. 0: none."""

    @property
    def kind(self) -> str:
        """`rl` if the stage trains on rollouts, else `supervised`."""
        return "rl" if self.rollouts.num_prompts else "supervised"

    @property
    def reads_solved(self) -> bool:
        """True if the stage reads solved examples, alone or mixed with its rollouts."""
        return self.kind == "supervised" or bool(self.rollouts.num_solved)

    @property
    def uses_reference(self) -> bool:
        """True if the loss or the reward compares with a frozen reference."""
        return bool(self.objective.reference_users()) or bool(self.reward.legibility_cost)

    def optimizer_of(self, part: str) -> OptimizerConfig:
        """The optimizer of `main` or `head`."""
        return self.optimizers.main if part == "main" else self.optimizers.head

    def advantage_rule(self) -> Advantage:
        """The stage's rule, or that of its algorithm."""
        if self.advantage.kind is None:
            return self.objective.policy.rules().advantage
        return ADVANTAGES.get(self.advantage.kind, "advantage.kind")

    def channel_gradient_at(self, step: int) -> float:
        """Channel gradient of a step counted from 0."""
        if step >= self.channel_ramp_steps:
            return self.channel_gradient
        # Not from 0: main may be reached through the channel alone, and needs some gradient.
        return self.channel_gradient * (step + 1) / (self.channel_ramp_steps + 1)

    def validate(self, name: str) -> None:
        """Raises ValueError naming the key of an impossible value."""
        key = f"stages.{name}"
        self.objective.validate(f"{key}.objective")
        if not self.objective.active():
            raise ValueError(f"{key}.objective must give some stream a weight above 0, got none")
        if bool(self.examples.batch_size) == bool(self.rollouts.num_prompts):
            found = "both" if self.examples.batch_size else "neither"
            raise ValueError(
                f"{key} must have either {key}.examples.batch_size or {key}.rollouts.num_prompts "
                f"above 0, got {found}; a stage trains on solved examples or on rollouts"
            )
        if self.kind == "rl":
            self._validate_rollouts(key)
        else:
            self._validate_examples(key)
        if not (self.train_main or self.train_head):
            raise ValueError(f"{key} must train main, the head or both, got neither")
        if self.train_head and not self.objective.trains_head:
            raise ValueError(
                f"{key}.train_head is true but no stream trains the head; give head_ce, head_kl, "
                "head_tv, policy or reference_kl a weight (and the last two a head_weight), or set "
                "train_head=false"
            )
        self.optimizers.main.validate(f"{key}.optimizers.main")
        self.optimizers.head.validate(f"{key}.optimizers.head")

    def _validate_examples(self, key: str) -> None:
        for name, stream in self.objective.active().items():
            if stream.reads == "rollouts":
                raise ValueError(
                    f"{key}.objective.{name} reads rollouts, got a stage of solved examples; set "
                    f"{key}.rollouts.num_prompts in place of {key}.examples.batch_size"
                )
        if self.gradient_split_every:
            raise ValueError(
                f"{key}.gradient_split_every must be 0 in a stage that is supervised, got "
                f"{self.gradient_split_every}; it measures the gradient of rollouts"
            )
        check_unset(self, key, "rollouts", "reward", "advantage")

    def _validate_rollouts(self, key: str) -> None:
        rollouts = self.rollouts
        check_unset(self, key, "examples")
        rollouts.validate(f"{key}.rollouts")
        self.advantage.validate(f"{key}.advantage")
        compares_prompts = self.objective.policy.weight and self.advantage_rule() is not batch_std
        if compares_prompts and rollouts.group_size < 2:
            raise ValueError(
                f"{key}.rollouts.group_size must be at least 2, got {rollouts.group_size}: an "
                "advantage compares the rollouts of one prompt; increase it, or set "
                f"{key}.advantage.kind=batch_std, which compares those of the step"
            )
        if rollouts.drop_uninformative and self.advantage_rule() is batch_std:
            raise ValueError(
                f"{key}.rollouts.drop_uninformative=true leaves out groups whose outcomes agree, "
                "which have an advantage under batch_std; set it to false, or choose another "
                f"{key}.advantage.kind"
            )
        kl = self.objective.reference_kl
        if kl.weight and kl.kind != "full" and kl.head_weight and rollouts.mode != "fast":
            raise ValueError(
                f"{key}.objective.reference_kl.kind={kl.kind} estimates the divergence from tokens "
                f"that were sampled, and the head samples none with {key}.rollouts.mode="
                f"{rollouts.mode}; use {key}.objective.reference_kl.kind=full or head_weight=0"
            )
        if self.objective.policy.correction_cap and not rollouts.recompute_old:
            raise ValueError(
                f"{key}.objective.policy.correction_cap={self.objective.policy.correction_cap:g} "
                f"needs {key}.rollouts.recompute_old=true: without it p_old is the sampler's, and "
                "there is nothing to correct"
            )
        is_corrected = rollouts.recompute_old and self.objective.policy.correction_cap
        if rollouts.lag and self.objective.policy.weight and not is_corrected:
            raise ValueError(
                f"{key}.rollouts.lag=1 samples by weights that are one step old; set "
                f"{key}.rollouts.recompute_old=true and {key}.objective.policy.correction_cap "
                "(2 is usual), which correct for it"
            )
        if self.gradient_split_every and not (self.objective.policy.weight and self.train_main):
            raise ValueError(
                f"{key}.gradient_split_every={self.gradient_split_every} measures main's policy "
                f"gradient; set {key}.train_main=true and {key}.objective.policy.weight above 0, "
                "or set it to 0"
            )
        chooses = rollouts.num_anchors or rollouts.block_anchors
        if chooses and rollouts.mode == "fast" and not rollouts.num_solved:
            raise ValueError(
                f"{key}.rollouts.num_anchors and block_anchors choose anchors of solved examples "
                "and of slow and verified rollouts, and this stage has neither; leave them out"
            )
        reads = self.objective.reads_solved
        if reads and not rollouts.num_solved:
            raise ValueError(
                f"{key}.objective.main_ce and head_ce read solved examples: set "
                f"{key}.rollouts.num_solved above 0, or on_rollouts=true to score the "
                "rollouts"
            )
        if rollouts.num_solved and not reads:
            raise ValueError(
                f"{key}.rollouts.num_solved={rollouts.num_solved} examples are read by no stream; "
                f"give {key}.objective.main_ce or head_ce a weight"
            )
