//! How a deployment wants its weights stored.

use crate::config::model::ModelConfig;

listed! {
    /// The format of a deployment's weights, as its users name it.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
    pub enum WeightFormat {
        /// As the checkpoint has them: fp8 where it is fp8, else bf16.
        #[default]
        Native,
        Bf16,
        /// E4M3 numbers with a scale per 128 × 128 weights.
        Fp8,
        /// Integers with a scale per 64 inputs of an output.
        Int8,
        /// Feed-forward parts in 4 bits with a scale per 32 inputs of an output; the rest in int8.
        Int4,
    }
}

impl WeightFormat {
    /// As `--weights`, packed.json and fingerprints spell it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Native => "native",
            Self::Bf16 => "bf16",
            Self::Fp8 => "fp8",
            Self::Int8 => "int8",
            Self::Int4 => "int4",
        }
    }

    /// The format that a model is held in: where `Native` leads, else the format itself.
    pub fn resolved(self, config: &ModelConfig) -> Self {
        match self {
            Self::Native if config.fp8_blocks.is_some() => Self::Fp8,
            Self::Native => Self::Bf16,
            Self::Bf16 | Self::Fp8 | Self::Int8 | Self::Int4 => self,
        }
    }
}

impl std::fmt::Display for WeightFormat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for WeightFormat {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|format| format.name() == name);
        found.ok_or_else(|| format!("{name} is none of {}", Self::ALL.map(Self::name).join(", ")))
    }
}
