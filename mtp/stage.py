"""A stage: what is trained, on what, for how long. A run is a list of them."""

from dataclasses import dataclass, field

from .advantage import AdvantageConfig
from .algorithms import ADVANTAGES
from .objectives import ObjectiveConfig
from .optim import OptimizerConfig
from .reward import RewardConfig

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
    batch_size: int = 64
    """Supervised: sequences a step, over all processes."""
    num_anchors: int = 0
    """Supervised: anchors drawn per sequence, 0 for all. Fewer save memory and time."""
    block_anchors: bool = False
    """Supervised: only the anchors at which passes begin when the text is decoded, a (K+1)-th of
    them. False makes an anchor of every position of a fast phase."""
    num_prompts: int = 16
    """RL: P, prompts a step, over all processes."""
    group_size: int = 16
    """RL: G, rollouts of each prompt."""
    num_minibatches: int = 1
    """RL: optimizer steps on each batch of rollouts, each on its own share of the prompts."""
    micro_batch_size: int = 0
    """Sequences of one forward and backward; 0 takes a step's sequences at once."""
    gradient_checkpointing: bool = False
    """Recompute main's layers in the backward: less memory, about a third more time."""
    main: OptimizerConfig = field(default_factory=OptimizerConfig)
    head: OptimizerConfig = field(default_factory=OptimizerConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    evaluate_every: int = 0
    """Steps between two evaluations on a smaller set; 0 evaluates at the end only."""

    def validate(self, name: str) -> None:
        """Raises ValueError naming the key of an impossible value."""
        key = f"stages.{name}"
        if self.kind not in KINDS:
            raise ValueError(f"{key}.kind must be supervised or rl, got {self.kind!r}")
        for field_name in ("batch_size", "num_prompts", "num_minibatches"):
            if getattr(self, field_name) < 1:
                value = getattr(self, field_name)
                raise ValueError(f"{key}.{field_name} must be at least 1, got {value}")
        for field_name in ("steps", "num_anchors", "micro_batch_size", "evaluate_every"):
            if getattr(self, field_name) < 0:
                value = getattr(self, field_name)
                raise ValueError(f"{key}.{field_name} must be 0 or above, got {value}")
        if self.kind == "rl" and self.group_size < 2:
            raise ValueError(
                f"{key}.group_size must be at least 2, got {self.group_size}: an advantage "
                "compares the rollouts of one prompt"
            )
        if self.num_prompts % self.num_minibatches:
            raise ValueError(
                f"{key}.num_minibatches must divide {key}.num_prompts={self.num_prompts}, got "
                f"{self.num_minibatches}"
            )
        active = self.objective.active()
        if not active:
            raise ValueError(f"{key}.objective must give some stream a weight above 0, got none")
        if self.kind == "supervised" and "policy" in active:
            raise ValueError(f"{key}.objective.policy needs {key}.kind=rl, got supervised")
        self.objective.policy.validate(f"{key}.objective.policy")
        if self.advantage.kind not in (None, *ADVANTAGES):
            raise ValueError(
                f"{key}.advantage.kind must be null or one of {', '.join(ADVANTAGES)}, got "
                f"{self.advantage.kind!r}"
            )
        if not (self.train_main or self.train_head):
            raise ValueError(f"{key} must train main, the head or both, got neither")
        if self.train_head and not self.objective.uses_head:
            raise ValueError(
                f"{key}.train_head is true but no stream scores the head; give head_ce, head_kl, "
                "policy or leash a weight, or set train_head=false"
            )
        self.main.validate(f"{key}.main")
        self.head.validate(f"{key}.head")
