//! The engine's side of the mesh: rows of a layer go to whoever has their experts, answers come back in order.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use expertmesh_engine::{Backend, Exchange, Grouped, NotResident, Routes, group};
use expertmesh_proto::expert::{Answers, Rows};
use expertmesh_proto::placement::Placement;
use tokio::sync::watch;

use super::peers::{Outcome, Outgoing, Peers, Reply};
use super::residency::{LoadFailed, Residency};
use super::route::{Holders, Known, Target, route};
use crate::metrics::labels::Reroute;
use crate::traces::{self, Span, SpanKind};

/// How long a holder that said "not resident" is passed over for a copy, or asked to load where there is none.
const COLD: Duration = Duration::from_secs(1);

/// Dispatches to peers and collects from them; one per engine thread.
pub(crate) struct MeshExchange<B: Backend> {
    peers: Arc<Peers>,
    residency: Arc<Residency<B>>,
    placement: watch::Receiver<Arc<Placement>>,
    holders: Holders,
    outcomes: (mpsc::Sender<Outcome>, mpsc::Receiver<Outcome>),
    next_ticket: u64,
    /// Until when an expert counts as not resident in a slot: (layer, expert, slot).
    cold: BTreeMap<(u32, u32, u32), Instant>,
    layer: LayerState<B>,
}

/// One layer of one step on its way. A pair is (row, slot among its top k): row · top_k + slot.
struct LayerState<B: Backend> {
    /// (rows, hidden), once a row has to travel.
    host: Option<Vec<u16>>,
    /// (pairs, hidden)
    answers: Option<B::Activations>,
    local: Vec<u32>,
    flights: BTreeMap<u64, Flight>,
    /// Per expert, the peers that failed it in this layer.
    tried: BTreeMap<u32, Vec<u32>>,
}

struct Flight {
    slot: u32,
    attempt: u32,
    load: bool,
    sent: Instant,
    /// Ascending.
    pairs: Vec<u32>,
    span: Span,
}

impl<B: Backend> LayerState<B> {
    fn new(answers: Option<B::Activations>) -> Self {
        Self { host: None, answers, local: Vec::new(), flights: BTreeMap::new(), tried: BTreeMap::new() }
    }
}

impl<B: Backend> MeshExchange<B> {
    pub(crate) fn new(
        peers: Arc<Peers>,
        residency: Arc<Residency<B>>,
        placement: watch::Receiver<Arc<Placement>>,
    ) -> Self {
        let holders = Holders::of(&placement.borrow());
        let (cold, layer) = (BTreeMap::new(), LayerState::new(None));
        Self { peers, residency, placement, holders, outcomes: mpsc::channel(), next_ticket: 0, cold, layer }
    }

    fn me(&self) -> u32 {
        self.peers.shared.identity.slot
    }

    /// Sends pairs where their experts are; keeps those that are computed here.
    fn send(
        &mut self,
        backend: &B,
        layer: usize,
        normed: &B::Activations,
        routes: &Routes,
        (pairs, attempt): (&[u32], u32),
    ) {
        let alive = self.peers.alive();
        let mut targets: BTreeMap<u32, Target> = BTreeMap::new();
        let mut tickets: BTreeMap<Target, Vec<u32>> = BTreeMap::new();
        for &pair in pairs {
            let expert = routes.experts[pair as usize];
            let target =
                *targets.entry(expert).or_insert_with(|| self.target(backend, &alive, layer, expert));
            match target {
                Target::Local => self.layer.local.push(pair),
                peer => tickets.entry(peer).or_default().push(pair),
            }
        }
        for (target, pairs) in tickets {
            let (slot, load) = match target {
                Target::Holder(slot) => (slot, false),
                Target::Elected(slot) => (slot, true),
                Target::Local => continue,
            };
            let host = self.layer.host.get_or_insert_with(|| backend.download_activations(normed));
            let rows = rows_of(host, layer as u32, load, routes, &pairs);
            let span = traces::current().child("dispatch", SpanKind::Client);
            self.launch(Flight { slot, attempt, load, sent: Instant::now(), pairs, span }, rows);
        }
    }

    fn target(&self, backend: &B, alive: &BTreeSet<u32>, layer: usize, expert: u32) -> Target {
        let me = self.me();
        let tried = self.layer.tried.get(&expert).map_or(&[][..], Vec::as_slice);
        let layer = layer as u32;
        let cold = self.cold.range((layer, expert, 0)..=(layer, expert, u32::MAX));
        let mut cold: Vec<u32> = cold.map(|(&(.., slot), _)| slot).collect();
        if !backend.is_resident(layer as usize, expert) {
            cold.push(me);
        }
        route(&self.holders, me, (layer, expert), &Known { alive, tried, cold: &cold })
    }

    fn launch(&mut self, flight: Flight, mut rows: Rows) {
        self.next_ticket += 1;
        let ticket = self.next_ticket;
        let (slot, pairs) = (flight.slot, flight.pairs.len() as u64);
        if !flight.span.is_none() {
            describe(&flight.span, slot, &rows);
            flight.span.set("expertmesh.attempt", i64::from(flight.attempt));
            rows.traceparent = flight.span.traceparent();
        }
        let reply = Reply::new(ticket, self.outcomes.0.clone());
        let outgoing = Outgoing { ticket, attempt: flight.attempt, rows, reply };
        self.layer.flights.insert(ticket, flight);
        if self.peers.send(slot, outgoing) {
            self.peers.shared.metrics.mesh.dispatched(slot, pairs);
        }
    }

    /// Computes the pairs that stayed here. Gives back those whose expert cannot be loaded, once; then it is an error.
    fn compute(
        &mut self,
        backend: &B,
        layer: usize,
        normed: &B::Activations,
        routes: &Routes,
    ) -> Result<Vec<u32>, LoadFailed> {
        let again = self.load(layer, routes)?;
        let Grouped { groups, at } = group(routes, std::mem::take(&mut self.layer.local));
        if groups.is_empty() {
            return Ok(again);
        }
        let outputs = loop {
            match backend.experts(layer, normed, &groups) {
                Ok(outputs) => break outputs,
                // Evicted since we asked.
                Err(NotResident { expert, .. }) => self.residency.ensure(layer as u32, expert)?,
            }
        };
        if let Some(answers) = &mut self.layer.answers {
            backend.scatter(&outputs, &at, answers);
        }
        Ok(again)
    }

    /// Loads the experts of the pairs that stayed here. Those that fail leave, to be tried elsewhere.
    fn load(&mut self, layer: usize, routes: &Routes) -> Result<Vec<u32>, LoadFailed> {
        let (me, mut again) = (self.me(), Vec::new());
        let expert_of = |pair: &u32| routes.experts[*pair as usize];
        let experts: BTreeSet<u32> = self.layer.local.iter().map(expert_of).collect();
        for expert in experts {
            let Err(failure) = self.residency.ensure(layer as u32, expert) else { continue };
            let tried = self.layer.tried.entry(expert).or_default();
            if tried.contains(&me) {
                return Err(failure);
            }
            tried.push(me);
            tracing::warn!("{failure}; asking the others");
            again.extend(self.layer.local.extract_if(.., |pair| routes.experts[*pair as usize] == expert));
        }
        if !again.is_empty() {
            again.sort_unstable();
            self.peers.shared.metrics.mesh.rerouted(Reroute::LoadFailed, again.len() as u64);
        }
        Ok(again)
    }

    /// Takes one outcome: answers into their places; what has none becomes pairs to send again.
    fn take(
        &mut self,
        backend: &B,
        layer: usize,
        routes: &Routes,
        outcome: Outcome,
    ) -> Option<(Vec<u32>, u32)> {
        let mut flight = self.layer.flights.remove(&outcome.ticket)?;
        let metrics = &self.peers.shared.metrics.mesh;
        let answers = match outcome.result {
            Ok(answers) => answers,
            Err(failure) => {
                flight.span.fail(failure.name());
                metrics.rerouted(Reroute::Peer(failure), flight.pairs.len() as u64);
                self.give_up(routes, &flight, |_| true);
                return Some((flight.pairs, flight.attempt + 1));
            }
        };
        // This thread may have computed meanwhile: what counts is when the answer came.
        metrics.answered(flight.slot, outcome.at.duration_since(flight.sent));
        flight.span.end_at(outcome.at);
        let Answers { not_resident, values } = answers;
        let absent = |pair: &u32| not_resident.contains(&routes.experts[*pair as usize]);
        let (again, answered): (Vec<u32>, Vec<u32>) = flight.pairs.iter().partition(|pair| absent(pair));
        if let Some(answers) = &mut self.layer.answers {
            backend.scatter(&backend.upload(&values), &answered, answers);
        }
        if again.is_empty() {
            return None;
        }
        metrics.rerouted(Reroute::NotResident, again.len() as u64);
        let until = Instant::now() + COLD;
        self.cold.extend(not_resident.iter().map(|&expert| ((layer as u32, expert, flight.slot), until)));
        if flight.load {
            self.give_up(routes, &flight, |expert| not_resident.contains(&expert));
        }
        Some((again, flight.attempt + 1))
    }

    fn give_up(&mut self, routes: &Routes, flight: &Flight, which: impl Fn(u32) -> bool) {
        let experts: BTreeSet<u32> = flight.pairs.iter().map(|&pair| routes.experts[pair as usize]).collect();
        for expert in experts.into_iter().filter(|&expert| which(expert)) {
            self.layer.tried.entry(expert).or_default().push(flight.slot);
        }
    }
}

impl<B: Backend> Exchange<B> for MeshExchange<B> {
    type Error = LoadFailed;

    fn dispatch(
        &mut self,
        backend: &B,
        layer: usize,
        normed: &B::Activations,
        routes: &Routes,
    ) -> Result<(), LoadFailed> {
        if self.placement.has_changed().unwrap_or(false) {
            self.holders = Holders::of(&self.placement.borrow_and_update());
            self.cold.clear();
        }
        let now = Instant::now();
        self.cold.retain(|_, until| *until > now);
        self.layer = LayerState::new(Some(backend.zeros(routes.experts.len())));
        let pairs: Vec<u32> = (0..routes.experts.len() as u32).collect();
        self.send(backend, layer, normed, routes, (&pairs, 0));
        Ok(())
    }

    fn collect(
        &mut self,
        backend: &B,
        layer: usize,
        normed: &B::Activations,
        routes: &Routes,
    ) -> Result<B::Activations, LoadFailed> {
        loop {
            let again = self.compute(backend, layer, normed, routes)?;
            if !again.is_empty() {
                self.send(backend, layer, normed, routes, (&again, 1));
                continue;
            }
            if self.layer.flights.is_empty() && self.layer.local.is_empty() {
                break;
            }
            // Every flight has its outcome: the link, or its teardown, sends one.
            let Ok(outcome) = self.outcomes.1.recv() else { break };
            if let Some((pairs, attempt)) = self.take(backend, layer, routes, outcome) {
                self.send(backend, layer, normed, routes, (&pairs, attempt));
            }
        }
        Ok(self.layer.answers.take().unwrap_or_else(|| backend.zeros(0)))
    }
}

/// Whose rows, or for whom, and how many.
pub(crate) fn describe(span: &Span, slot: u32, rows: &Rows) {
    span.set("expertmesh.peer", i64::from(slot));
    span.set("expertmesh.layer", i64::from(rows.layer));
    span.set("expertmesh.rows", rows.row_experts.len() as i64);
    span.set("expertmesh.pairs", rows.experts.len() as i64);
}

/// The rows of pairs, each once with its experts. `pairs` ascend, so the experts of a row do.
fn rows_of(host: &[u16], layer: u32, load: bool, routes: &Routes, pairs: &[u32]) -> Rows {
    let top_k = routes.top_k as u32;
    let hidden = host.len() * routes.top_k / routes.experts.len();
    let mut rows = Rows { layer, load, ..Rows::default() };
    for chunk in pairs.chunk_by(|a, b| a / top_k == b / top_k) {
        let row = (chunk[0] / top_k) as usize;
        rows.row_experts.push(chunk.len() as u32);
        rows.experts.extend(chunk.iter().map(|&pair| routes.experts[pair as usize]));
        rows.values.extend_from_slice(&host[row * hidden..(row + 1) * hidden]);
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_travels_once_per_peer_with_its_experts() {
        let routes = Routes { top_k: 2, experts: vec![3, 9, 1, 9, 3, 4], weights: vec![0.5; 6] };
        let host = [0, 0, 1, 1, 2, 2]; // (3 rows, 2)
        let rows = rows_of(&host, 5, true, &routes, &[0, 1, 4]);
        let expected = Rows {
            layer: 5,
            load: true,
            row_experts: vec![2, 1],
            experts: vec![3, 9, 3],
            values: vec![0, 0, 2, 2],
            traceparent: String::new(),
        };
        assert_eq!(rows, expected);
    }
}
