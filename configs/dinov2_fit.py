"""DINOv2's ViT-S/14, frozen, with a head that is LDA on your classes, barely trained.

    python main.py --config=configs/dinov2_fit.py

On the emoji, or with --config.data.source=cub, or yours: folder, and --config.data.root. The
features are the class tokens of the last four blocks, as DINO's linear evaluation takes them, at
224 pixels, each once through the trunk. "before" is what they give as they are, "fitted" LDA on the
training classes, "after" one step from it. Recall@1 to expect before, of the last class token alone
(open-metric-learning): SOP .566, In-Shop .332, CUB .795, Cars .740. Without a run:
`siamese-jax fit --trunk=vit_small_patch14_reg4_dinov2`.
"""

from configs import common


def get_config():
    config = common.base()
    config.trunk.update(
        name="vit_small_patch14_reg4_dinov2",
        image_size=224,
        stage="block9,block10,block11,block12",
        pool="cls",
    )
    config.head = common.linear_head(384)
    config.distance = "cosine"
    config.cache.views = 0
    config.train.update(steps=1, rehearse=False, patience=0)
    return config
