//! What one process with all experts answers: the truth that every other arrangement is compared with.

use std::collections::BTreeMap;
use std::process::Command;
use std::sync::Mutex;

use crate::process::binary;
use crate::tiny_r1;

/// `expertmesh-worker generate --json`.
#[derive(Debug, Clone, PartialEq, serde::Deserialize)]
pub struct Generated {
    pub prompt_tokens: Vec<u32>,
    /// The end of the sequence included.
    pub tokens: Vec<u32>,
    pub text: String,
    pub finish_reason: String,
}

/// A question and how it is sampled.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Question {
    pub prompt: String,
    /// `None`: greedy. Some: the model's own temperature with this seed.
    pub seed: Option<u64>,
    /// Some: so many tokens, whatever ends on the way.
    pub length: Option<u32>,
    /// With [`PENALTIES`], so that every token depends on those before it in one more way.
    pub penalized: bool,
}

/// What penalized questions are asked with.
pub struct Penalties {
    pub repetition: f32,
    pub presence: f32,
    pub frequency: f32,
}

pub const PENALTIES: Penalties = Penalties { repetition: 1.25, presence: 0.25, frequency: 0.5 };

impl Question {
    pub fn greedy(prompt: &str) -> Self {
        Self { prompt: prompt.into(), seed: None, length: None, penalized: false }
    }

    /// A question whose answer takes long enough for something to happen meanwhile.
    pub fn long(seed: u64, length: u32) -> Self {
        let prompt = "Spell the word expert.".into();
        Self { prompt, seed: Some(seed), length: Some(length), penalized: true }
    }

    /// Different questions, half of them sampled.
    pub fn several(count: usize) -> Vec<Self> {
        let question = |at: usize| {
            let prompt = match at % 4 {
                0 => format!("What is {} + {}?", 20 + at * 7, 31 + at * 3),
                1 => format!("Compute {} - {}.", 900 + at * 5, 13 * at + 7),
                2 => format!(
                    "What is the capital of {}?",
                    ["France", "Japan", "Kenya", "Chile", "Norway"][at / 4 % 5]
                ),
                _ => format!(
                    "Spell the word {}.",
                    ["banana", "router", "expert", "kernel", "ocean"][at / 4 % 5]
                ),
            };
            Self { prompt, seed: (at % 2 == 1).then_some(at as u64), length: None, penalized: at % 4 == 3 }
        };
        (0..count).map(question).collect()
    }
}

/// What one process answers; asked once per question.
pub fn reference(question: &Question) -> Generated {
    static KNOWN: Mutex<BTreeMap<Question, Generated>> = Mutex::new(BTreeMap::new());
    if let Some(known) = KNOWN.lock().expect("no test died while asking").get(question) {
        return known.clone();
    }
    let mut command = Command::new(binary("expertmesh-worker"));
    command.args(["generate", "--json", "--chat", "--prompt", &question.prompt, "--model"]).arg(tiny_r1());
    match question.seed {
        Some(seed) => command.args(["--seed", &seed.to_string()]),
        None => command.args(["--temperature", "0"]),
    };
    if let Some(length) = question.length {
        command.args(["--ignore-eos", "--max-tokens", &length.to_string()]);
    }
    if question.penalized {
        let Penalties { repetition, presence, frequency } = PENALTIES;
        command.args(["--repetition-penalty", &repetition.to_string()]);
        command.args(["--presence-penalty", &presence.to_string()]);
        command.args(["--frequency-penalty", &frequency.to_string()]);
    }
    let output = command.output().expect("generate runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let generated: Generated = serde_json::from_slice(&output.stdout).expect("one JSON object");
    KNOWN.lock().expect("no test died while asking").insert(question.clone(), generated.clone());
    generated
}
