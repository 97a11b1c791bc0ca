"""Training losses: reconstruction, spectral, perceptual, discriminators and adversarial terms.

Every loss reads float32 whatever the autocast and gives one scalar. Losses on signals take ``(x_hat, x)``, losses on
discriminator outputs ``(real, fake)``. Nothing is imported here, so that a training pays only for the losses it names.
"""
