//! What a worker has read of its model, on the wire.

use std::collections::BTreeMap;

use expertmesh_model::expert::ExpertId;

use crate::expert::Limits;
use crate::expert_set::ExpertSet;
use crate::invalid::Invalid;
use crate::v1;

/// Checksums (CRC-32C) of what a worker has read: two workers of a model have equal ones, or one of them has a wrong copy.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ReadWeights {
    /// Of all that is no routed expert.
    pub dense: u32,
    /// Of the experts' packed bytes.
    pub experts: BTreeMap<ExpertId, u32>,
    /// Whether tokens were made with these weights, and with all that was said before them.
    pub answered: bool,
}

impl ReadWeights {
    pub fn to_proto(&self) -> v1::ReadWeights {
        v1::ReadWeights {
            dense_crc32c: self.dense,
            experts: self.experts.keys().copied().collect::<ExpertSet>().to_proto(),
            expert_crc32c: self.experts.values().copied().collect(),
            answered: self.answered,
        }
    }

    /// Fails where there is not one checksum for each expert, or the model has no such expert.
    pub fn from_proto(message: &v1::ReadWeights, limits: &Limits) -> Result<Self, Invalid> {
        let (count, sums) = (span(&message.experts), message.expert_crc32c.len());
        if count != sums as u64 {
            let problem = format!("{sums} checksums for {count} experts");
            return Err(Invalid::new("weights.expert_crc32c", problem));
        }
        let experts = ExpertSet::from_proto(&message.experts)?;
        let layers = limits.first_moe_layer..limits.layers;
        if experts.len() != sums {
            return Err(Invalid::new("weights.experts", "an expert is named twice"));
        }
        if let Some(id) = experts.iter().find(|id| !layers.contains(&id.layer) || id.expert >= limits.experts)
        {
            return Err(Invalid::new("weights.experts", format!("the model has no {id}")));
        }
        let experts = experts.iter().zip(message.expert_crc32c.iter().copied()).collect();
        Ok(Self { dense: message.dense_crc32c, experts, answered: message.answered })
    }
}

/// How many experts the ranges name, before there is memory for them.
fn span(layers: &[v1::LayerExperts]) -> u64 {
    let ranges = layers.iter().flat_map(|layer| &layer.ranges);
    ranges.map(|range| (u64::from(range.last) + 1).saturating_sub(u64::from(range.first))).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits =
        Limits { hidden: 8, first_moe_layer: 1, layers: 3, experts: 16, experts_per_token: 2 };

    #[test]
    fn what_was_read_survives_the_wire_and_what_cannot_have_been_is_refused() {
        let experts = [((2, 3), 30), ((1, 15), 15), ((1, 0), 0)];
        let experts = experts.map(|((layer, expert), sum)| (ExpertId::new(layer, expert), sum)).into();
        let read = ReadWeights { dense: 7, experts, answered: true };
        assert_eq!(ReadWeights::from_proto(&read.to_proto(), &LIMITS).unwrap(), read);
        let none = ReadWeights::default();
        assert_eq!(ReadWeights::from_proto(&none.to_proto(), &LIMITS).unwrap(), none);

        let refused = |change: fn(&mut v1::ReadWeights)| {
            let mut message = read.to_proto();
            change(&mut message);
            ReadWeights::from_proto(&message, &LIMITS).unwrap_err().to_string()
        };
        assert!(refused(|message| message.expert_crc32c.truncate(2)).contains("2 checksums for 3 experts"));
        assert!(refused(|message| message.experts[0].layer = 0).contains("layer 0"));
        assert!(
            refused(|message| message.experts[0].ranges[1] = v1::ExpertRange { first: 16, last: 16 })
                .contains("expert 16")
        );
        assert!(
            refused(|message| message.experts[0].ranges[0].last = u32::MAX)
                .contains("for 4294967298 experts")
        );
        let twice = refused(|message| message.experts[0].ranges[1] = v1::ExpertRange { first: 0, last: 0 });
        assert!(twice.contains("twice"), "{twice}");
    }
}
