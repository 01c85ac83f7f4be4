"""A diffusion model of images: config and model, data, judging, report, folders of samples."""
