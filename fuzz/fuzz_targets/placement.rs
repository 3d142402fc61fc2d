//! A placement as JSON and as a message; what is read is written and read as the same.

#![no_main]
use expertmesh_proto::placement::Placement;
use expertmesh_proto::v1;
use libfuzzer_sys::fuzz_target;
use prost::Message;

fuzz_target!(|input: &[u8]| {
    if let Ok(placement) = serde_json::from_slice::<Placement>(input) {
        let json = serde_json::to_vec(&placement).expect("a placement is JSON");
        assert_eq!(serde_json::from_slice::<Placement>(&json).expect("it was read before"), placement);
    }
    let Ok(message) = v1::Placement::decode(input) else { return };
    if let Ok(placement) = Placement::from_proto(message) {
        let again = Placement::from_proto(placement.to_proto()).expect("it was read before");
        assert_eq!(again, placement);
    }
});
