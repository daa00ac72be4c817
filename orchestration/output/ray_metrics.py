"""The run's metrics as Ray metrics: in Ray's dashboard, and wherever its Prometheus endpoint is read."""

from collections.abc import Mapping

from ray.util.metrics import Gauge

from orchestration.output.metrics import METRICS


class RayMetrics:
    """A sink that sets one gauge for each name of the table: `lag/max` is `ray_async_ebft_lag_max`."""

    def __init__(self, run: str) -> None:
        """`run`: tag of every gauge, the folder of the run."""
        self._tags = {"run": run}
        self._gauges: dict[str, Gauge] = {}

    def write(self, row: Mapping[str, float]) -> None:
        """Set the gauges of this row."""
        for name, value in row.items():
            if name not in self._gauges:
                metric = METRICS[name]
                description = f"{metric.meaning} [{metric.unit}]"
                label = f"async_ebft_{name.replace('/', '_')}"
                self._gauges[name] = Gauge(label, description=description, tag_keys=("run",))
            self._gauges[name].set(value, tags=self._tags)

    def close(self) -> None:
        """Nothing to close: Ray exports what was set last."""
