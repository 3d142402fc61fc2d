//! ExpertMesh's engine: checkpoints, the forward pass, the paged latent cache. It knows no network.

// pub mod backend;
