//! Rows on the wire: cut into parts of at most 1 MiB, checked and joined on the other side.

use bytes::{Bytes, BytesMut};

use crate::invalid::Invalid;
use crate::v1;

/// What one message may hold, payload and lists together.
pub const MAX_PART_BYTES: usize = 1 << 20;
/// Rows that one ticket may carry.
pub const MAX_TICKET_ROWS: usize = 1024;
/// Tickets that one ordered pair of workers may have under way.
pub const MAX_TICKETS: usize = 2;
/// A longer `traceparent` is none of the version that we know: ignored.
const TRACEPARENT_BYTES: usize = 55;

/// A payload whose checksum is not that of its content: the sender counts as failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("crc32c: part {part} of ticket {ticket} arrived damaged")]
pub struct Damaged {
    pub ticket: u64,
    pub part: u32,
}

/// Why a part was not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PartError {
    #[error(transparent)]
    Invalid(#[from] Invalid),
    #[error(transparent)]
    Damaged(#[from] Damaged),
}

impl From<PartError> for tonic::Status {
    fn from(error: PartError) -> Self {
        match error {
            PartError::Invalid(invalid) => invalid.into(),
            PartError::Damaged(damaged) => tonic::Status::data_loss(damaged.to_string()),
        }
    }
}

/// Identifies a try of a piece of work on a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ticket {
    pub session: u64,
    pub ticket: u64,
    pub attempt: u32,
}

/// The model's limits, for checking what peers send.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    pub hidden: usize,
    pub first_moe_layer: u32,
    pub layers: u32,
    pub experts: u32,
    pub experts_per_token: usize,
}

impl Limits {
    /// Parts of a ticket or of its answer: no honest one needs more, since a part holds at least one row or one answer.
    pub fn max_parts(&self) -> usize {
        MAX_TICKET_ROWS * self.experts_per_token
    }

    fn rows_per_part(&self, lists: usize) -> usize {
        // 5 bytes bound a varint of u32; 192 cover the message's other fields.
        ((MAX_PART_BYTES - 192) / (self.hidden * 2 + lists * 5)).max(1)
    }
}

/// Rows of one layer, each with the experts that it is for.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Rows {
    pub layer: u32,
    /// Load what is not resident, rather than say so.
    pub load: bool,
    /// How many experts each row is for; at least 1.
    pub row_experts: Vec<u32>,
    /// The experts, row after row, ascending within a row.
    pub experts: Vec<u32>,
    /// The rows, of shape (rows, hidden), as bits of bf16.
    pub values: Vec<u16>,
    /// The span that these rows belong to, as W3C writes it; empty: none.
    pub traceparent: String,
}

impl Rows {
    /// Cuts the rows into messages of whole rows.
    pub fn to_parts(&self, ticket: Ticket, limits: &Limits) -> Vec<v1::Dispatch> {
        let per_part = limits.rows_per_part(limits.experts_per_token + 1);
        let count = self.row_experts.len().div_ceil(per_part) as u32;
        let mut expert = 0;
        let chunks = self.row_experts.chunks(per_part).zip(self.values.chunks(per_part * limits.hidden));
        let part = |(part, (row_experts, values)): (usize, (&[u32], &[u16]))| {
            let pairs = row_experts.iter().sum::<u32>() as usize;
            let experts = self.experts[expert..expert + pairs].to_vec();
            expert += pairs;
            let mut message = v1::Dispatch {
                session: ticket.session,
                ticket: ticket.ticket,
                attempt: ticket.attempt,
                part: part as u32,
                parts: count,
                crc32c: 0,
                layer: self.layer,
                load: self.load,
                row_experts: row_experts.to_vec(),
                experts,
                rows: to_bytes(values),
                traceparent: if part == 0 { self.traceparent.clone() } else { String::new() },
            };
            message.crc32c = dispatch_crc(&message);
            message
        };
        chunks.enumerate().map(part).collect()
    }
}

/// What a worker answers to [`Rows`].
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Answers {
    /// Experts of the layer that are not here.
    pub not_resident: Vec<u32>,
    /// (pairs whose expert is here, hidden), in the order of the dispatched pairs.
    pub values: Vec<u16>,
}

/// Cuts the answer to a ticket into messages of whole rows: `values` are those of all pairs whose expert is not among
/// `not_resident`, (pairs, hidden).
pub fn answer_parts(
    ticket: Ticket,
    not_resident: &[u32],
    values: &[u16],
    limits: &Limits,
) -> Vec<v1::Answer> {
    let per_part =
        limits.rows_per_part(0).saturating_sub(not_resident.len() * 5 / (limits.hidden * 2) + 1).max(1);
    let mut chunks: Vec<&[u16]> = values.chunks(per_part * limits.hidden).collect();
    if chunks.is_empty() {
        chunks.push(&[]);
    }
    let parts = chunks.len() as u32;
    let part = |(part, values): (usize, &[u16])| {
        let mut message = v1::Answer {
            session: ticket.session,
            ticket: ticket.ticket,
            attempt: ticket.attempt,
            part: part as u32,
            parts,
            crc32c: 0,
            not_resident: if part == 0 { not_resident.to_vec() } else { Vec::new() },
            rows: to_bytes(values),
        };
        message.crc32c = answer_crc(&message);
        message
    };
    chunks.into_iter().enumerate().map(part).collect()
}

/// Joins the parts of one ticket, which arrive in order.
#[derive(Debug)]
pub struct DispatchParts {
    ticket: Ticket,
    parts: u32,
    next: u32,
    rows: Rows,
}

impl DispatchParts {
    /// Starts at part 0. Returns the rows with the last part, `None` before.
    pub fn start(part: &v1::Dispatch, limits: &Limits) -> Result<Self, PartError> {
        check_parts(part.parts, limits.max_parts())?;
        let moe = limits.first_moe_layer..limits.layers;
        if !moe.contains(&part.layer) {
            return Err(Invalid::new(
                "dispatch.layer",
                format!("{} is outside {}..{}", part.layer, moe.start, moe.end),
            )
            .into());
        }
        let ticket = Ticket { session: part.session, ticket: part.ticket, attempt: part.attempt };
        let known = part.traceparent.len() <= TRACEPARENT_BYTES;
        let traceparent = if known { part.traceparent.clone() } else { String::new() };
        let rows = Rows { layer: part.layer, load: part.load, traceparent, ..Rows::default() };
        Ok(Self { ticket, parts: part.parts, next: 0, rows })
    }

    pub fn ticket(&self) -> Ticket {
        self.ticket
    }

    /// Takes the next part; true once it was the last.
    pub fn push(&mut self, part: v1::Dispatch, limits: &Limits) -> Result<bool, PartError> {
        let ticket = Ticket { session: part.session, ticket: part.ticket, attempt: part.attempt };
        check_order(
            ticket == self.ticket && part.parts == self.parts,
            part.part,
            self.next,
            "dispatch.part",
        )?;
        if (part.layer, part.load) != (self.rows.layer, self.rows.load) {
            return Err(Invalid::new("dispatch.layer", "differs between the parts of a ticket").into());
        }
        if !is_whole(dispatch_crc(&part), part.crc32c) {
            return Err(Damaged { ticket: part.ticket, part: part.part }.into());
        }
        check_size(part.rows.len() + 5 * (part.experts.len() + part.row_experts.len()), "dispatch.rows")?;
        check_experts(&part, limits)?;
        let rows = part.row_experts.len();
        if self.rows.row_experts.len() + rows > MAX_TICKET_ROWS {
            return Err(Invalid::new(
                "dispatch.rows",
                format!("a ticket carries at most {MAX_TICKET_ROWS} rows"),
            )
            .into());
        }
        self.rows.values.extend(from_bytes(&part.rows, rows, limits.hidden, "dispatch.rows")?);
        self.rows.row_experts.extend(part.row_experts);
        self.rows.experts.extend(part.experts);
        self.next += 1;
        Ok(self.next == self.parts)
    }

    pub fn into_rows(self) -> Rows {
        self.rows
    }
}

/// Joins the parts of one answer, which arrive in order.
#[derive(Debug)]
pub struct AnswerParts {
    /// The experts of the dispatched pairs, in order.
    experts: Vec<u32>,
    parts: Option<u32>,
    next: u32,
    answers: Answers,
}

impl AnswerParts {
    /// `experts` are those of the dispatched pairs, in order.
    pub fn new(experts: Vec<u32>) -> Self {
        Self { experts, parts: None, next: 0, answers: Answers::default() }
    }

    /// Takes the next part; true once it was the last, and then the answer is complete.
    pub fn push(&mut self, part: v1::Answer, limits: &Limits) -> Result<bool, PartError> {
        check_parts(part.parts, limits.max_parts())?;
        let parts = *self.parts.get_or_insert(part.parts);
        check_order(part.parts == parts, part.part, self.next, "answer.part")?;
        if !is_whole(answer_crc(&part), part.crc32c) {
            return Err(Damaged { ticket: part.ticket, part: part.part }.into());
        }
        check_size(part.rows.len() + 5 * part.not_resident.len(), "answer.rows")?;
        let named = &part.not_resident;
        if !named.is_sorted_by(|a, b| a < b) || named.last().is_some_and(|&last| last >= limits.experts) {
            let problem = format!("must ascend and stay below {}", limits.experts);
            return Err(Invalid::new("answer.not_resident", problem).into());
        }
        if part.part == 0 {
            self.answers.not_resident = part.not_resident;
        }
        let rows = part.rows.len() / (limits.hidden * 2);
        self.answers.values.extend(from_bytes(&part.rows, rows, limits.hidden, "answer.rows")?);
        self.next += 1;
        let expected = self.expected();
        let found = self.answers.values.len() / limits.hidden;
        if found > expected || (self.next == parts && found != expected) {
            return Err(
                Invalid::new("answer.rows", format!("{found} rows where {expected} were asked")).into()
            );
        }
        Ok(self.next == parts)
    }

    fn expected(&self) -> usize {
        self.experts.iter().filter(|expert| !self.answers.not_resident.contains(expert)).count()
    }

    pub fn into_answers(self) -> Answers {
        self.answers
    }
}

fn check_parts(parts: u32, most: usize) -> Result<(), Invalid> {
    if parts == 0 || parts as usize > most {
        return Err(Invalid::new("parts", format!("{parts} is outside 1..={most}")));
    }
    Ok(())
}

fn check_order(same: bool, part: u32, expected: u32, field: &'static str) -> Result<(), Invalid> {
    if !same || part != expected {
        return Err(Invalid::new(field, format!("part {part} came where part {expected} was expected")));
    }
    Ok(())
}

fn check_size(bytes: usize, field: &'static str) -> Result<(), Invalid> {
    if bytes > MAX_PART_BYTES {
        return Err(Invalid::new(
            field,
            format!("{bytes} bytes are more than the {MAX_PART_BYTES} of a message"),
        ));
    }
    Ok(())
}

fn check_experts(part: &v1::Dispatch, limits: &Limits) -> Result<(), Invalid> {
    let mut rest = part.experts.as_slice();
    for &count in &part.row_experts {
        let count = count as usize;
        if count == 0 || count > limits.experts_per_token || count > rest.len() {
            let problem =
                format!("{count} is outside 1..={}, or more than are listed", limits.experts_per_token);
            return Err(Invalid::new("dispatch.row_experts", problem));
        }
        let (row, after) = rest.split_at(count);
        if !row.is_sorted_by(|a, b| a < b) || row[count - 1] >= limits.experts {
            let problem = format!("{row:?} must ascend and stay below {}", limits.experts);
            return Err(Invalid::new("dispatch.experts", problem));
        }
        rest = after;
    }
    if !rest.is_empty() || part.row_experts.is_empty() {
        return Err(Invalid::new("dispatch.experts", "does not fit row_experts"));
    }
    Ok(())
}

fn to_bytes(values: &[u16]) -> Bytes {
    let mut bytes = BytesMut::with_capacity(values.len() * 2);
    values.iter().for_each(|value| bytes.extend_from_slice(&value.to_le_bytes()));
    bytes.freeze()
}

fn from_bytes(bytes: &[u8], rows: usize, hidden: usize, field: &'static str) -> Result<Vec<u16>, Invalid> {
    if bytes.len() != rows * hidden * 2 {
        return Err(Invalid::new(field, format!("{} bytes are not {rows} rows of {hidden}", bytes.len())));
    }
    let values: Vec<u16> = bytes.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]])).collect();
    // All bits of the exponent: infinity or NaN.
    if values.iter().any(|value| value & 0x7f80 == 0x7f80) {
        return Err(Invalid::new(field, "holds a value that is not finite"));
    }
    Ok(values)
}

/// CRC-32C (Castagnoli), as parts carry it.
pub fn checksum(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes)
}

/// Whether a payload has the checksum that its message tells. For a fuzzer, which cannot guess one, always.
fn is_whole(found: u32, told: u32) -> bool {
    cfg!(fuzzing) || found == told
}

fn dispatch_crc(part: &v1::Dispatch) -> u32 {
    let mut crc = checksum(&part.layer.to_le_bytes());
    for number in part.row_experts.iter().chain(&part.experts) {
        crc = crc32c::crc32c_append(crc, &number.to_le_bytes());
    }
    crc32c::crc32c_append(crc, &part.rows)
}

fn answer_crc(part: &v1::Answer) -> u32 {
    let crc =
        part.not_resident.iter().fold(0, |crc, expert| crc32c::crc32c_append(crc, &expert.to_le_bytes()));
    crc32c::crc32c_append(crc, &part.rows)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LIMITS: Limits =
        Limits { hidden: 1000, first_moe_layer: 1, layers: 6, experts: 32, experts_per_token: 4 };
    const TICKET: Ticket = Ticket { session: 7, ticket: 9, attempt: 1 };

    fn rows(count: usize) -> Rows {
        let row_experts: Vec<u32> = (0..count).map(|row| row as u32 % 4 + 1).collect();
        let experts = row_experts.iter().flat_map(|&n| (0..n).map(move |e| e * 3 + n)).collect();
        let values = (0..count * LIMITS.hidden).map(|at| at as u16 % 0x7f80).collect();
        let traceparent = "t".repeat(count % 56);
        Rows { layer: 2, load: count.is_multiple_of(2), row_experts, experts, values, traceparent }
    }

    fn join(parts: Vec<v1::Dispatch>) -> Result<Rows, PartError> {
        let mut joined = DispatchParts::start(&parts[0], &LIMITS)?;
        let count = parts.len();
        for (at, part) in parts.into_iter().enumerate() {
            assert_eq!(joined.push(part, &LIMITS)?, at + 1 == count);
        }
        Ok(joined.into_rows())
    }

    proptest! {
        #[test]
        fn rows_come_out_as_they_went_in(count in 1usize..900) {
            let rows = rows(count);
            let parts = rows.to_parts(TICKET, &LIMITS);
            prop_assert!(parts.iter().all(|part| prost::Message::encoded_len(part) <= MAX_PART_BYTES));
            prop_assert_eq!(join(parts).unwrap(), rows);
        }

        #[test]
        fn answers_come_out_as_they_went_in(count in 1usize..900, absent in proptest::collection::btree_set(0u32..32, 0..4)) {
            let asked: Vec<u32> = (0..count as u32).map(|at| at % 32).collect();
            let here = asked.iter().filter(|expert| !absent.contains(expert)).count();
            let values = (0..here * LIMITS.hidden).map(|at| at as u16 % 0x7f80).collect();
            let answers = Answers { not_resident: absent.into_iter().collect(), values };
            let mut joined = AnswerParts::new(asked);
            let parts = answer_parts(TICKET, &answers.not_resident, &answers.values, &LIMITS);
            let last = parts.len() - 1;
            for (at, part) in parts.into_iter().enumerate() {
                prop_assert!(prost::Message::encoded_len(&part) <= MAX_PART_BYTES);
                prop_assert_eq!(joined.push(part, &LIMITS).unwrap(), at == last);
            }
            prop_assert_eq!(joined.into_answers(), answers);
        }

        #[test]
        fn a_forged_dispatch_never_panics(layer: u32, parts: u32, part: u32, row_experts in proptest::collection::vec(any::<u32>(), 0..6),
            experts in proptest::collection::vec(any::<u32>(), 0..6), rows in proptest::collection::vec(any::<u8>(), 0..64)) {
            let mut forged = v1::Dispatch { layer, parts, part, row_experts, experts, rows: rows.into(), ..Default::default() };
            forged.crc32c = dispatch_crc(&forged);
            if let Ok(mut joined) = DispatchParts::start(&forged, &LIMITS) {
                prop_assert!(joined.push(forged, &LIMITS).is_err());
            }
        }
    }

    #[test]
    fn what_breaks_the_protocol_is_refused_by_field() {
        let field = |change: fn(&mut v1::Dispatch)| {
            let mut parts = rows(3).to_parts(TICKET, &LIMITS);
            change(&mut parts[0]);
            parts[0].crc32c = dispatch_crc(&parts[0]);
            match join(parts).unwrap_err() {
                PartError::Invalid(invalid) => invalid.field,
                PartError::Damaged(_) => "damaged",
            }
        };
        assert_eq!(field(|part| part.layer = 0), "dispatch.layer");
        assert_eq!(field(|part| part.parts = 0), "parts");
        assert_eq!(field(|part| part.part = 1), "dispatch.part");
        assert_eq!(field(|part| part.row_experts[1] = 5), "dispatch.row_experts");
        assert_eq!(field(|part| part.experts[0] = 32), "dispatch.experts");
        assert_eq!(field(|part| part.rows = to_bytes(&[0x7fc0; 3000])), "dispatch.rows");
        assert_eq!(field(|part| part.rows = part.rows.slice(2..)), "dispatch.rows");
    }

    #[test]
    fn an_answer_that_names_what_no_layer_has_is_refused() {
        for not_resident in [vec![32], vec![5, 5], vec![5, 4]] {
            let answers = Answers { not_resident, values: vec![0; LIMITS.hidden] };
            let part = answer_parts(TICKET, &answers.not_resident, &answers.values, &LIMITS).remove(0);
            let error = AnswerParts::new(vec![3]).push(part, &LIMITS).unwrap_err();
            assert!(matches!(error, PartError::Invalid(invalid) if invalid.field == "answer.not_resident"));
        }
    }

    #[test]
    fn a_flipped_bit_is_noticed() {
        let mut parts = rows(3).to_parts(TICKET, &LIMITS);
        let mut damaged = parts[0].rows.to_vec();
        damaged[5] ^= 1;
        parts[0].rows = damaged.into();
        assert_eq!(join(parts).unwrap_err(), PartError::Damaged(Damaged { ticket: 9, part: 0 }));
    }
}
