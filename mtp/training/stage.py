"""A stage: what is trained, on what, for how long. A run is a list of them."""

from dataclasses import dataclass, field

from ..rollouts.advantage import ADVANTAGES, Advantage, AdvantageConfig
from ..rollouts.reward import RewardConfig
from .objectives import ObjectiveConfig
from .optimizers import OptimizerConfig

KINDS = ("supervised", "rl")


@dataclass(kw_only=True)
class StageConfig:
    """One stage of a run."""

    kind: str = "supervised"
    """`supervised`: solved examples of the task. `rl`: the policy's own rollouts."""
    steps: int = 100
    """Optimizer steps; a stage of 0 steps is left out of the run."""
    train_main: bool = True
    train_head: bool = True
    channel_gradient: float = 1.0
    """Scale of the head's gradient on main: 1 opens the channel, 0 closes it."""
    channel_ramp_steps: int = 0
    """Steps over which the scale rises evenly from 0 to `channel_gradient`; 0: constant."""
    logits_detach: bool = False
    """Keep the head's gradient off an output matrix that it shares with main. The channel, through
    the taps, stays as `channel_gradient` has it."""
    reference: str = "previous"
    """Frozen model that reference_kl and preserve compare with: main as the `previous` stage, the
    `first` or an earlier one by name left it; `start`: the model that the run began from."""
    batch_size: int = 64
    """Supervised: sequences a step, over all processes."""
    num_anchors: int = 0
    """Anchors drawn per sequence of solved examples or slow rollouts, 0 for all. Fewer save memory
    and time."""
    block_anchors: bool = False
    """Only the anchors at which passes begin when that text is decoded, a (K+1)-th of them. False
    makes an anchor of every position of a fast phase."""
    num_prompts: int = 16
    """RL: P, prompts a step, over all processes."""
    group_size: int = 16
    """RL: G, rollouts of each prompt."""
    num_minibatches: int = 1
    """RL: optimizer steps on each batch of rollouts, each on its own share of the prompts."""
    num_epochs: int = 1
    """RL: times that each batch of rollouts is gone through, with anchors drawn anew."""
    rollout_mode: str = "fast"
    """RL: `fast`: the head's tokens are executed. `slow`: main writes alone, and the head's rows
    score what main wrote (an auxiliary loss)."""
    recompute_old: bool = False
    """RL: take ratios to the log-probabilities of a replay before the update, one more forward, and
    not to the sampler's. Then `objective.policy.correction_cap` corrects for their difference."""
    drop_uninformative: bool = False
    """RL: leave groups whose outcomes all agree out of the replay."""
    max_rounds: int = 1
    """RL: with `drop_uninformative`, sample `num_prompts` further prompts up to so many times until
    there are `num_prompts` informative groups (DAPO's dynamic sampling)."""
    num_solved: int = 0
    """RL: solved examples mixed into each optimizer step, for main_ce and head_ce (supervised
    replay), over all processes."""
    micro_batch_size: int = 0
    """Sequences of one forward and backward; 0 takes a step's sequences at once."""
    gradient_checkpointing: bool = False
    """Recompute main's layers in the backward: less memory, about a third more time."""
    main: OptimizerConfig = field(default_factory=OptimizerConfig)
    head: OptimizerConfig = field(default_factory=OptimizerConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    stop_accuracy: float = 0.0
    """End the stage once fast accuracy reaches this on the training problems that come next; 0
    takes all steps. Held-out problems have no say in it."""
    stop_every: int = 20
    """Steps between two looks at `stop_accuracy`."""
    evaluate_every: int = 0
    """Steps between two evaluations on a smaller set; 0 evaluates at the end only."""

    @property
    def uses_reference(self) -> bool:
        """True if the loss or the reward compares with a frozen reference."""
        return bool(self.objective.reference_users()) or bool(self.reward.legibility_cost)

    def advantage_rule(self) -> Advantage:
        """The stage's rule, or that of its algorithm."""
        if self.advantage.kind is None:
            return self.objective.policy.rules().advantage
        return ADVANTAGES.get(self.advantage.kind, "advantage.kind")

    def validate(self, name: str) -> None:
        """Raises ValueError naming the key of an impossible value."""
        key = f"stages.{name}"
        if self.kind not in KINDS:
            raise ValueError(f"{key}.kind must be supervised or rl, got {self.kind!r}")
        for field_name in (
            "batch_size",
            "num_prompts",
            "num_minibatches",
            "num_epochs",
            "max_rounds",
            "stop_every",
        ):
            if getattr(self, field_name) < 1:
                value = getattr(self, field_name)
                raise ValueError(f"{key}.{field_name} must be at least 1, got {value}")
        at_least_0 = ("steps", "num_anchors", "micro_batch_size", "evaluate_every", "num_solved")
        for field_name in (*at_least_0, "channel_ramp_steps", "channel_gradient"):
            if getattr(self, field_name) < 0:
                value = getattr(self, field_name)
                raise ValueError(f"{key}.{field_name} must be 0 or above, got {value}")
        if not 0 <= self.stop_accuracy <= 1:
            raise ValueError(
                f"{key}.stop_accuracy must be between 0 and 1, got {self.stop_accuracy}"
            )
        least = 2 if self.kind == "rl" and self.objective.policy.weight else 1
        if self.group_size < least:
            raise ValueError(
                f"{key}.group_size must be at least {least}, got {self.group_size}"
                + (": an advantage compares the rollouts of one prompt" if least == 2 else "")
            )
        if self.num_prompts % self.num_minibatches:
            raise ValueError(
                f"{key}.num_minibatches must divide {key}.num_prompts={self.num_prompts}, got "
                f"{self.num_minibatches}"
            )
        if self.kind == "rl":
            self._validate_rl(key)
        self.objective.validate(f"{key}.objective")
        active = self.objective.active()
        if not active:
            raise ValueError(f"{key}.objective must give some stream a weight above 0, got none")
        for stream_name, stream in active.items():
            if self.kind == "supervised" and stream.reads == "rollouts":
                raise ValueError(
                    f"{key}.objective.{stream_name} reads rollouts and needs {key}.kind=rl, got "
                    "supervised"
                )
        self.reward.validate(f"{key}.reward")
        self.advantage.validate(f"{key}.advantage")
        if not (self.train_main or self.train_head):
            raise ValueError(f"{key} must train main, the head or both, got neither")
        if self.train_head and not self.objective.uses_head:
            raise ValueError(
                f"{key}.train_head is true but no stream scores the head; give head_ce, head_kl, "
                "policy or reference_kl a weight, or set train_head=false"
            )
        self.main.validate(f"{key}.main")
        self.head.validate(f"{key}.head")

    def _validate_rl(self, key: str) -> None:
        if self.rollout_mode not in ("fast", "slow"):
            raise ValueError(f"{key}.rollout_mode must be fast or slow, got {self.rollout_mode!r}")
        if self.max_rounds > 1 and not self.drop_uninformative:
            raise ValueError(
                f"{key}.max_rounds={self.max_rounds} samples until enough groups are informative; "
                f"set {key}.drop_uninformative=true"
            )
        reads = self.objective.reads_solved
        if reads and not self.num_solved:
            raise ValueError(
                f"{key}.objective.main_ce and head_ce read solved examples: set {key}.num_solved "
                "to a number a step, or on_rollouts=true to score the rollouts"
            )
        if self.num_solved and not reads:
            raise ValueError(
                f"{key}.num_solved={self.num_solved} examples are read by no stream; give "
                f"{key}.objective.main_ce or head_ce a weight"
            )

    def channel_gradient_at(self, step: int) -> float:
        """The scale in a step counted from 0."""
        if step >= self.channel_ramp_steps:
            return self.channel_gradient
        return self.channel_gradient * step / self.channel_ramp_steps
