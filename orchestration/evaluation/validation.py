"""When the held-out documents are evaluated, and where the results go."""

from orchestration.evaluation.evaluation import Evaluator
from orchestration.output.metrics import MetricsLog
from orchestration.output.report import RunReport


class Validation:
    """Evaluates before the first step, at a fixed interval of steps, and after the last one."""

    def __init__(
        self,
        evaluator: Evaluator,
        metrics: MetricsLog,
        report: RunReport,
        *,
        every_steps: int,
        last_step: int,
        evaluated_step: int = -1,
    ) -> None:
        """`evaluated_step`: of the last evaluation of a run that is continued."""
        self._evaluator, self._metrics, self._report = evaluator, metrics, report
        self._every_steps, self._last_step = every_steps, last_step
        self.evaluated_step = evaluated_step
        """Of the last evaluation; -1 before the first."""
        self._score: float | None = None

    def score_of(self, step: int) -> float | None:
        """CFM after this step, lower is better; None if it was not evaluated."""
        return self._score if step == self.evaluated_step else None

    async def after_step(self, step: int) -> None:
        """Evaluate if due; step 0 is before training."""
        regular = self._every_steps and step % self._every_steps == 0
        if self._evaluator.num_documents == 0 or not (step in (0, self._last_step) or regular):
            return
        if step == self.evaluated_step:  # before the run was stopped
            return
        evaluation = await self._evaluator.evaluate(step)
        self._metrics.log_evaluation(
            step,
            {
                "eval/cross_entropy": float(evaluation.cross_entropy.mean()),
                "eval/cfm_loss": float(evaluation.cfm_loss.mean()),
                "eval/seconds": evaluation.seconds,
            },
        )
        self._report.evaluated(evaluation)
        self.evaluated_step, self._score = step, float(evaluation.cfm_loss.mean())
