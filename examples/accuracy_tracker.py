"""Trackers of one's own: --config.log.to=examples/accuracy_tracker.py:write, or :Notebook (docs/trackers.md)."""


def write(run, step, metrics):
    """Append the held-out accuracy of each evaluation to accuracy.csv in the run directory."""
    if "eval/rule/accuracy" in metrics:
        with open(run.folder / "accuracy.csv", "a") as file:
            file.write(f"{step},{metrics['eval/rule/accuracy']}\n")


class Notebook:
    """Writes a line per step and the first response of each sample to notes.txt in the run directory."""

    def __init__(self, run):
        self.file = open(run.folder / "notes.txt", "a")

    def log(self, step, metrics):
        """Write the step's reward."""
        self.file.write(f"step {step}: reward {metrics.get('reward/mean', float('nan')):.3f}\n")
        self.file.flush()

    def log_samples(self, step, samples):
        """Write a response to each sampled problem."""
        for sample in samples:
            self.file.write(f"  {sample['question']} -> {sample['responses'][0]['text']}\n")

    def close(self):
        """Close the file."""
        self.file.close()
