"""A stage: what is trained, on what, for how long. A run is a list of them.

A stage trains on solved `examples` of the task or on the policy's own `rollouts`; which of the two
is set says what kind of stage it is.
"""

from dataclasses import dataclass, field

from ..common.bounds import bounded
from ..rollouts.advantage import ADVANTAGES, Advantage, AdvantageConfig
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
    """Where the head runs in a text that it did not help to write."""

    num_anchors: int = bounded(0, at_least=0)
    """Anchors sampled per sequence of solved examples or slow rollouts, 0 for all. Fewer save
    memory and time."""
    block_anchors: bool = False
    """Only the anchors at which passes begin when that text is decoded, a (K+1)-th of them. False
    makes an anchor of every position of a fast phase."""


@dataclass(kw_only=True)
class ExamplesConfig(AnchorsConfig):
    """Solved examples of the task, which a supervised stage trains on."""

    batch_size: int = bounded(0, at_least=0)
    """Sequences a step, over all processes; 0: the stage trains on rollouts."""


@dataclass(kw_only=True)
class RolloutsConfig(AnchorsConfig):
    """The policy's own rollouts, which an RL stage trains on."""

    num_prompts: int = bounded(0, at_least=0)
    """P, prompts a step, over all processes; 0: the stage trains on solved examples."""
    group_size: int = bounded(16, at_least=1)
    """G, rollouts of each prompt."""
    mode: str = "fast"
    """`fast`: the head's tokens are executed. `slow`: main writes alone, and the head's rows score
    what main wrote (an auxiliary loss)."""
    num_minibatches: int = bounded(1, at_least=1)
    """Optimizer steps on each batch of rollouts, each on its own share of the prompts."""
    num_epochs: int = bounded(1, at_least=1)
    """Times that each batch of rollouts is gone through, with anchors sampled anew."""
    recompute_old: bool = False
    """Take ratios to the log-probabilities of a replay before the update, one more forward, and not
    to the sampler's. Then `objective.policy.correction_cap` corrects for their difference."""
    drop_uninformative: bool = False
    """Leave groups whose outcomes all agree out of the replay."""
    max_rounds: int = bounded(1, at_least=1)
    """With `drop_uninformative`, sample `num_prompts` further prompts up to so many times until
    there are `num_prompts` informative groups (DAPO's dynamic sampling)."""
    num_solved: int = bounded(0, at_least=0)
    """Solved examples mixed into each optimizer step, for main_ce and head_ce (supervised replay),
    over all processes."""

    def validate(self, key: str) -> None:
        """Raises ValueError naming the key of an impossible value."""
        if self.mode not in ("fast", "slow"):
            raise ValueError(f"{key}.mode must be fast or slow, got {self.mode!r}")
        if self.num_prompts % self.num_minibatches:
            raise ValueError(
                f"{key}.num_minibatches must divide {key}.num_prompts={self.num_prompts}, got "
                f"{self.num_minibatches}"
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
    """Optimizer steps; a stage of 0 steps is left out of the run."""
    examples: ExamplesConfig = field(default_factory=ExamplesConfig)
    """Solved examples of the task, if their `batch_size` is above 0."""
    rollouts: RolloutsConfig = field(default_factory=RolloutsConfig)
    """The policy's own rollouts, if their `num_prompts` is above 0."""
    train_main: bool = True
    """True trains main's parameters."""
    train_head: bool = True
    """True trains the head's parameters."""
    channel_gradient: float = bounded(1.0, at_least=0)
    """Scale of the head's gradient on main: 1 opens the channel, 0 closes it."""
    channel_ramp_steps: int = bounded(0, at_least=0)
    """Steps over which the scale rises evenly from 0 to `channel_gradient`; 0: constant."""
    logits_detach: bool = False
    """Keep the head's gradient off an output matrix that it shares with main. The channel, through
    the taps, stays as `channel_gradient` has it."""
    reference: str = "previous"
    """Frozen model that reference_kl and preserve compare with: main as the `previous` stage, the
    `first` or an earlier one by name left it; `start`: the model that the run began from."""
    micro_batch_size: int = bounded(0, at_least=0)
    """Sequences of one forward and backward; 0 takes a step's sequences at once."""
    gradient_checkpointing: bool = False
    """Recompute main's layers in the backward: less memory, about a third more time."""
    optimizers: OptimizersConfig = field(default_factory=OptimizersConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    stop_accuracy: float = bounded(0.0, at_least=0, at_most=1)
    """End the stage once fast accuracy reaches this on the training problems that come next; 0
    takes all steps. Held-out problems have no say in it."""
    stop_every: int = bounded(20, at_least=1)
    """Steps between two looks at `stop_accuracy`."""
    evaluate_every: int = bounded(0, at_least=0)
    """Steps between two evaluations on a smaller set; 0 evaluates at the end only."""

    @property
    def kind(self) -> str:
        """`rl` if the stage trains on rollouts, else `supervised`."""
        return "rl" if self.rollouts.num_prompts else "supervised"

    @property
    def reads_solved(self) -> bool:
        """True if the stage reads solved examples, alone or beside its rollouts."""
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
        """The scale in a step counted from 0."""
        if step >= self.channel_ramp_steps:
            return self.channel_gradient
        return self.channel_gradient * step / self.channel_ramp_steps

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
        if self.train_head and not self.objective.uses_head:
            raise ValueError(
                f"{key}.train_head is true but no stream scores the head; give head_ce, head_kl, "
                "policy or reference_kl a weight, or set train_head=false"
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
        check_unset(self, key, "rollouts", "reward", "advantage")

    def _validate_rollouts(self, key: str) -> None:
        rollouts = self.rollouts
        check_unset(self, key, "examples")
        rollouts.validate(f"{key}.rollouts")
        self.advantage.validate(f"{key}.advantage")
        if self.objective.policy.weight and rollouts.group_size < 2:
            raise ValueError(
                f"{key}.rollouts.group_size must be at least 2, got {rollouts.group_size}: an "
                "advantage compares the rollouts of one prompt"
            )
        reads = self.objective.reads_solved
        if reads and not rollouts.num_solved:
            raise ValueError(
                f"{key}.objective.main_ce and head_ce read solved examples: set "
                f"{key}.rollouts.num_solved to a number a step, or on_rollouts=true to score the "
                "rollouts"
            )
        if rollouts.num_solved and not reads:
            raise ValueError(
                f"{key}.rollouts.num_solved={rollouts.num_solved} examples are read by no stream; "
                f"give {key}.objective.main_ce or head_ce a weight"
            )
