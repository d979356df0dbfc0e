"""Writes tests/fixtures/tfds: a tiny prepared tensorflow-datasets directory with the features of `gsm8k`.

Preparing needs tensorflow; reading the result does not, which is what the test shows.  The six problems are our
own.  array_record is the format that gives random access:

    python -m venv .venv-tf && .venv-tf/bin/pip install tensorflow-cpu tensorflow-datasets array_record
    .venv-tf/bin/python tests/make_tfds_fixture.py
"""

import shutil
from pathlib import Path

FEATURES = ("question", "answer", "annotation", "short_answer")
TRAIN = (
    (
        "A tray holds 6 scones. Nora bakes 4 trays and sells 9 scones. How many scones are left?",
        "Nora bakes 6*4 = <<6*4=24>>24 scones.\nShe keeps 24-9 = <<24-9=15>>15 scones.",
        "15",
    ),
    (
        "A ferry carries 1,200 people a day. How many people does it carry in 5 days?",
        "It carries 1200*5 = <<1200*5=6000>>6000 people.",
        "6,000",
    ),
    (
        "Ivo owes Jana 8 euros and pays back 11. By how much does Ivo's debt stand after that?",
        "His debt is 8-11 = <<8-11=-3>>-3 euros.",
        "-3",
    ),
    (
        "A café sells 3 teas at $1.50 each. How many dollars does it take?",
        "It takes 3*1.50 = $<<3*1.50=4.5>>4.5.",
        "4.5",
    ),
)
TEST = (
    ("A shelf has 7 rows of 8 jars. How many jars is that?", "That is 7*8 = <<7*8=56>>56 jars.", "56"),
    ("Half of 90 lamps are lit. How many are dark?", "90/2 = <<90/2=45>>45 lamps are dark.", "45"),
)


def main() -> None:
    import tensorflow_datasets as tfds

    class Gsm8k(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = tfds.features.FeaturesDict({name: tfds.features.Text() for name in FEATURES})
            return tfds.core.DatasetInfo(builder=self, description="Six word problems.", features=features)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(TRAIN), "test": self._generate_examples(TEST)}

        def _generate_examples(self, rows):
            for i, (question, worked, answer) in enumerate(rows):
                values = (question, f"{worked}\n#### {answer}", worked, answer)
                yield i, dict(zip(FEATURES, values, strict=True))

    target = Path(__file__).parent / "fixtures" / "tfds"
    shutil.rmtree(target, ignore_errors=True)
    Gsm8k(data_dir=target, file_format="array_record").download_and_prepare()


if __name__ == "__main__":
    main()
