//! The parts of a ticket and of its answer, each message after the other. An input is messages with their length before them,
//! as on the wire; the first byte says what they are.

#![no_main]
use expertmesh_proto::expert::{AnswerParts, DispatchParts, Limits};
use expertmesh_proto::v1;
use libfuzzer_sys::fuzz_target;
use prost::Message;

const LIMITS: Limits = Limits { hidden: 8, first_moe_layer: 1, layers: 4, experts: 16, experts_per_token: 4 };

fuzz_target!(|input: &[u8]| {
    let Some((kind, mut rest)) = input.split_first() else { return };
    if kind % 2 == 0 {
        let mut parts = None;
        while let Ok(part) = v1::Dispatch::decode_length_delimited(&mut rest) {
            let started = match parts.take() {
                Some(parts) => Ok(parts),
                None => DispatchParts::start(&part, &LIMITS),
            };
            let Ok(mut started) = started else { return };
            match started.push(part, &LIMITS) {
                Ok(false) => parts = Some(started),
                Ok(true) => drop(started.into_rows()),
                Err(_) => return,
            }
        }
    } else {
        let mut parts = AnswerParts::new(vec![0, 1, 2, 1]);
        while let Ok(part) = v1::Answer::decode_length_delimited(&mut rest) {
            if parts.push(part, &LIMITS).is_err() {
                return;
            }
        }
    }
});
