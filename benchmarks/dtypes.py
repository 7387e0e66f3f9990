r"""Training in bfloat16 beside float32: what the result is, and how far seeds lie apart.

    python benchmarks/dtypes.py --data=emoji

Once the default, a head behind a frozen trunk, with all its steps of batch-hard triplets, for it
would choose none of them on the emoji; once `configs/finetune.py`, where the trunk's last stages
move, short. A seed also chooses the classes of the test, alike for both types.
"""

import finetune
import records

COLUMNS = ["config", *finetune.COLUMNS]
TYPES = ("float32", "bfloat16")
STEPS = {
    "resnet_triplet": "train.rehearse=False",
    "finetune": "train.steps=40 optim.warmup_steps=5 cache.views=0",
}


def main() -> None:
    args = finetune.parsed(__doc__)
    rows = []
    for config, steps in STEPS.items():
        settings = [f"{steps} trunk.dtype={name} {' '.join(args.set or [])}" for name in TYPES]
        rows += [[config, *row] for row in finetune.measured(args, config, settings)]
    if args.record:
        records.save("dtypes", COLUMNS, rows, [finetune.NOTE.format(args.seeds)])


if __name__ == "__main__":
    main()
