//! Sampling parameters as the messages between frontend and worker spell them.

use expertmesh_model::sampling::SamplingParams;
use expertmesh_proto::v1;

/// The message that tells a worker how to sample.
pub(crate) fn message(params: &SamplingParams) -> v1::Sampling {
    let bias = |&(id, bias): &(u32, f32)| v1::TokenBias { id, bias };
    v1::Sampling {
        temperature: params.temperature,
        top_p: params.top_p,
        top_k: params.top_k,
        min_p: params.min_p,
        seed: params.seed,
        repetition_penalty: params.repetition_penalty,
        presence_penalty: params.presence_penalty,
        frequency_penalty: params.frequency_penalty,
        logit_bias: params.logit_bias.iter().map(bias).collect(),
    }
}

/// The sampling parameters of a message, not yet checked.
pub(crate) fn params(message: v1::Sampling) -> SamplingParams {
    SamplingParams {
        temperature: message.temperature,
        top_p: message.top_p,
        top_k: message.top_k,
        min_p: message.min_p,
        seed: message.seed,
        repetition_penalty: message.repetition_penalty,
        presence_penalty: message.presence_penalty,
        frequency_penalty: message.frequency_penalty,
        logit_bias: message.logit_bias.into_iter().map(|v1::TokenBias { id, bias }| (id, bias)).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_samples_as_it_is_told() {
        let sent = SamplingParams {
            temperature: 0.1,
            top_p: 0.2,
            top_k: 3,
            min_p: 0.4,
            seed: 5,
            repetition_penalty: 0.6,
            presence_penalty: 0.7,
            frequency_penalty: 0.8,
            logit_bias: vec![(9, 1.0), (10, -1.0)],
        };
        assert_eq!(params(message(&sent)), sent);
    }
}
