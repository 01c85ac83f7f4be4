"""What the config.json of published U-Nets say, as far as it differs from their classes."""

PUBLISHED = {
    "unet_sd15": {
        "_class_name": "UNet2DConditionModel",
        "attention_head_dim": 8,
        "cross_attention_dim": 768,
    },
    "unet_sd15_inpainting": {
        "_class_name": "UNet2DConditionModel",
        "attention_head_dim": 8,
        "cross_attention_dim": 768,
        "in_channels": 9,
    },
    "unet_sd21": {
        "_class_name": "UNet2DConditionModel",
        "attention_head_dim": [5, 10, 20, 20],
        "cross_attention_dim": 1024,
        "upcast_attention": True,
        "use_linear_projection": True,
    },
    "unet_sdxl": {
        "_class_name": "UNet2DConditionModel",
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "attention_head_dim": [5, 10, 20],
        "block_out_channels": [320, 640, 1280],
        "cross_attention_dim": 2048,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "projection_class_embeddings_input_dim": 2816,
        "transformer_layers_per_block": [1, 2, 10],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "use_linear_projection": True,
    },
    "unet_ddpm_cifar10": {
        "_class_name": "UNet2DModel",
        "attention_head_dim": None,
        "block_out_channels": [128, 256, 256, 256],
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "norm_eps": 1e-6,
        "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    },
}
