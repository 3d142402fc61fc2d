//! The engine's side of the mesh: rows of a layer go to whoever has their experts, answers come back in order.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use expertmesh_engine::{Backend, Exchange, Pinned, Routes};
use expertmesh_model::expert::ExpertId;
use expertmesh_proto::expert::{Answers, Rows};
use expertmesh_proto::placement::Placement;
use expertmesh_proto::slot::Slot;
use tokio::sync::watch;

use super::peers::Peers;
use super::residency::{LoadFailed, Residency};
use super::route::{Holders, Known, Target, route};
use super::ticket::{Outcome, Outgoing, Reply, describe};
use crate::metrics::labels::Reroute;
use crate::traces::{self, Span, SpanKind};

/// How long a holder that said "not resident" is passed over for a copy, or asked to load where there is none.
const COLD: Duration = Duration::from_secs(1);

/// Dispatches to peers and collects from them; one per engine thread.
pub(crate) struct MeshExchange {
    peers: Arc<Peers>,
    residency: Arc<Residency>,
    placement: watch::Receiver<Arc<Placement>>,
    /// How many experts a layer has.
    experts: usize,
    holders: Holders,
    /// Layers whose experts all belong here: where they are resident too, nothing leaves.
    whole: BTreeSet<u32>,
    outcomes: (mpsc::Sender<Outcome>, mpsc::Receiver<Outcome>),
    next_ticket: u64,
    /// Until when an expert counts as not resident in a slot.
    cold: BTreeMap<(ExpertId, Slot), Instant>,
}

/// One layer of one step on its way. A pair is (row, choice among its top k): row · top_k + choice.
pub(crate) struct InFlight<B: Backend> {
    layer: u32,
    /// The experts' outputs so far: (pairs, hidden).
    answers: B::Activations,
    /// The gate's choice, once rows may leave.
    routes: Option<Routes>,
    here: Here,
    tickets: BTreeMap<u64, Flight>,
    /// Per expert, the slots that failed it in this layer.
    tried: BTreeMap<u32, Vec<Slot>>,
}

/// What is to be computed by this worker.
#[derive(Default)]
struct Here {
    resident: Pinned,
    /// To be loaded first, ascending.
    absent: Vec<u32>,
}

/// A ticket that a peer has.
struct Flight {
    slot: Slot,
    attempt: u32,
    load: bool,
    sent: Instant,
    /// The pairs that the peer computes, ascending.
    pairs: Vec<u32>,
    span: Span,
}

/// Pairs that go to a peer, or go there again.
struct Leaving {
    /// The pairs' places among the answers, ascending.
    pairs: Vec<u32>,
    attempt: u32,
}

impl MeshExchange {
    /// For a model with so many `experts` in a layer.
    pub(crate) fn new(
        peers: Arc<Peers>,
        residency: Arc<Residency>,
        placement: watch::Receiver<Arc<Placement>>,
        experts: usize,
    ) -> Self {
        let (holders, whole, cold) = (Holders::default(), BTreeSet::new(), BTreeMap::new());
        let outcomes = mpsc::channel();
        let mut new =
            Self { peers, residency, placement, experts, holders, whole, outcomes, next_ticket: 0, cold };
        new.follow();
        new
    }

    fn me(&self) -> Slot {
        self.peers.shared.identity.slot
    }

    /// Takes the current placement as the one to go by.
    fn follow(&mut self) {
        self.holders = Holders::of(&self.placement.borrow_and_update());
        self.whole = self.holders.whole_layers(self.me(), self.experts);
        self.cold.clear();
    }

    /// All experts of a layer, where they belong here and are resident.
    fn all_here<B: Backend>(&self, backend: &B, layer: usize) -> Option<Pinned> {
        if !self.whole.contains(&(layer as u32)) {
            return None;
        }
        let all: Vec<u32> = (0..self.experts as u32).collect();
        Some(backend.pin(layer, &all)).filter(|pinned| pinned.missing().is_empty())
    }

    /// Sends pairs where their experts are; keeps those that are computed here.
    fn send<B: Backend>(
        &mut self,
        backend: &B,
        queue: &mut B::Queue,
        normed: &B::Activations,
        flight: &mut InFlight<B>,
        leaving: &Leaving,
    ) {
        let Some(routes) = &flight.routes else { return };
        let expert_of = |pair: u32| routes.experts[pair as usize];
        let experts = distinct(leaving.pairs.iter().map(|&pair| expert_of(pair)));
        let resident = backend.pin(flight.layer as usize, &experts);
        let alive = self.peers.shared.alive();
        let target = |&expert: &u32| (expert, self.target(flight, &resident, &alive, expert));
        let targets: BTreeMap<u32, Target> = experts.iter().map(target).collect();
        let mut tickets: BTreeMap<Target, Vec<u32>> = BTreeMap::new();
        for &pair in &leaving.pairs {
            match targets[&expert_of(pair)] {
                Target::Local => {}
                peer => tickets.entry(peer).or_default().push(pair),
            }
        }
        let stays = |expert: u32| targets[&expert] == Target::Local;
        let absent = resident.missing().iter().copied().filter(|&expert| stays(expert)).collect();
        let here = Here { resident: resident.only(stays), absent };
        if !tickets.is_empty() {
            let top_k = routes.top_k as u32;
            let rows = distinct(tickets.values().flatten().map(|pair| pair / top_k));
            let values = backend.gather(queue, normed, &rows).wait(); // (rows, hidden)
            let gathered = Gathered { rows, values: &values, hidden: backend.config().hidden };
            for (target, pairs) in tickets {
                let Some((slot, load)) = peer_of(target) else { continue };
                let rows = gathered.for_peer(flight.layer, load, routes, &pairs);
                let span = traces::current().child("dispatch", SpanKind::Client);
                let attempt = leaving.attempt;
                let ticket = Flight { slot, attempt, load, sent: Instant::now(), pairs, span };
                self.launch(&mut flight.tickets, ticket, rows);
            }
        }
        flight.here = here;
    }

    fn target<B: Backend>(
        &self,
        flight: &InFlight<B>,
        resident: &Pinned,
        alive: &BTreeSet<Slot>,
        expert: u32,
    ) -> Target {
        let (me, id) = (self.me(), ExpertId::new(flight.layer, expert));
        let tried = flight.tried.get(&expert).map_or(&[][..], Vec::as_slice);
        let mut cold: Vec<Slot> =
            self.cold.range((id, Slot(0))..=(id, Slot(u32::MAX))).map(|(&(_, slot), _)| slot).collect();
        if !resident.holds(expert) {
            cold.push(me);
        }
        route(&self.holders, me, id, &Known { alive, tried, cold: &cold })
    }

    fn launch(&mut self, tickets: &mut BTreeMap<u64, Flight>, flight: Flight, mut rows: Rows) {
        self.next_ticket += 1;
        let (ticket, slot, pairs) = (self.next_ticket, flight.slot, flight.pairs.len() as u64);
        if !flight.span.is_none() {
            describe(&flight.span, slot, &rows);
            flight.span.set("expertmesh.attempt", i64::from(flight.attempt));
            rows.traceparent = flight.span.traceparent();
        }
        let reply = Reply::new(ticket, self.outcomes.0.clone());
        let outgoing = Outgoing { ticket, attempt: flight.attempt, rows, reply };
        tickets.insert(ticket, flight);
        if self.peers.send(slot, outgoing) {
            self.peers.shared.metrics.mesh.dispatched(slot, pairs);
        }
    }

    /// Computes what stayed here. Gives back the pairs whose expert cannot be loaded, once; then it is an error.
    fn compute<B: Backend>(
        &mut self,
        backend: &B,
        queue: &mut B::Queue,
        normed: &B::Activations,
        routes: &B::Routes,
        flight: &mut InFlight<B>,
    ) -> Result<Option<Leaving>, LoadFailed> {
        let Here { resident, absent } = std::mem::take(&mut flight.here);
        let used: Vec<u32> = resident.held().collect();
        if used.is_empty() && absent.is_empty() {
            return Ok(None);
        }
        self.residency.used(flight.layer, &used);
        backend.experts(queue, &resident, normed, routes, &mut flight.answers);
        let (mut wanted, failed) = self.load(flight, absent)?;
        while !wanted.is_empty() {
            let loaded = backend.pin(flight.layer as usize, &wanted);
            backend.experts(queue, &loaded, normed, routes, &mut flight.answers);
            // Evicted since it was loaded.
            wanted = loaded.missing().to_vec();
            for &expert in &wanted {
                self.residency.ensure(ExpertId::new(flight.layer, expert))?;
            }
        }
        let Some(routes) = flight.routes.as_ref().filter(|_| !failed.is_empty()) else { return Ok(None) };
        let pairs = (0..).zip(&routes.experts).filter(|(_, expert)| failed.contains(expert));
        let pairs: Vec<u32> = pairs.map(|(pair, _)| pair).collect();
        self.peers.shared.metrics.mesh.rerouted(Reroute::LoadFailed, pairs.len() as u64);
        Ok(Some(Leaving { pairs, attempt: 1 }))
    }

    /// Loads experts; those that were, and those that are to be tried elsewhere.
    fn load<B: Backend>(
        &self,
        flight: &mut InFlight<B>,
        absent: Vec<u32>,
    ) -> Result<(Vec<u32>, Vec<u32>), LoadFailed> {
        let (me, mut loaded, mut failed) = (self.me(), Vec::new(), Vec::new());
        for expert in absent {
            let Err(failure) = self.residency.ensure(ExpertId::new(flight.layer, expert)) else {
                loaded.push(expert);
                continue;
            };
            let tried = flight.tried.entry(expert).or_default();
            if tried.contains(&me) {
                return Err(failure);
            }
            tried.push(me);
            tracing::warn!("{failure}; asking the others");
            failed.push(expert);
        }
        Ok((loaded, failed))
    }

    /// Takes one outcome: answers into their places; what has none is to be sent again.
    fn take<B: Backend>(
        &mut self,
        backend: &B,
        queue: &mut B::Queue,
        flight: &mut InFlight<B>,
        outcome: Outcome,
    ) -> Option<Leaving> {
        let mut ticket = flight.tickets.remove(&outcome.ticket)?;
        let routes = flight.routes.as_ref()?;
        let expert_of = |pair: &u32| routes.experts[*pair as usize];
        let metrics = &self.peers.shared.metrics.mesh;
        let attempt = ticket.attempt + 1;
        let Answers { not_resident, values } = match outcome.result {
            Ok(answers) => answers,
            Err(reason) => {
                ticket.span.fail(reason.name());
                metrics.rerouted(Reroute::Peer(reason), ticket.pairs.len() as u64);
                give_up(&mut flight.tried, ticket.slot, ticket.pairs.iter().map(expert_of));
                return Some(Leaving { pairs: ticket.pairs, attempt });
            }
        };
        // This thread may have computed meanwhile: what counts is when the answer came.
        metrics.answered(ticket.slot, outcome.at.duration_since(ticket.sent));
        ticket.span.end_at(outcome.at);
        let absent = |pair: &u32| not_resident.contains(&expert_of(pair));
        let (again, answered): (Vec<u32>, Vec<u32>) = ticket.pairs.iter().partition(|pair| absent(pair));
        backend.place(queue, &values, &answered, &mut flight.answers);
        if again.is_empty() {
            return None;
        }
        metrics.rerouted(Reroute::NotResident, again.len() as u64);
        if ticket.load {
            give_up(&mut flight.tried, ticket.slot, again.iter().map(expert_of));
        }
        let until = Instant::now() + COLD;
        let id = |expert| ExpertId::new(flight.layer, expert);
        self.cold.extend(not_resident.iter().map(|&expert| ((id(expert), ticket.slot), until)));
        Some(Leaving { pairs: again, attempt })
    }
}

impl<B: Backend> Exchange<B> for MeshExchange {
    type InFlight = InFlight<B>;
    type Error = LoadFailed;

    fn dispatch(
        &mut self,
        backend: &B,
        queue: &mut B::Queue,
        layer: usize,
        normed: &B::Activations,
        routes: &B::Routes,
    ) -> Result<InFlight<B>, LoadFailed> {
        if self.placement.has_changed().unwrap_or(false) {
            self.follow();
        }
        let now = Instant::now();
        self.cold.retain(|_, until| *until > now);
        let answers = backend.answers(queue, routes);
        let mut flight = InFlight::new(layer as u32, answers);
        if let Some(resident) = self.all_here(backend, layer) {
            flight.here = Here { resident, absent: Vec::new() };
            return Ok(flight);
        }
        let routes = backend.routes(queue, routes).wait();
        let all = Leaving { pairs: (0..routes.experts.len() as u32).collect(), attempt: 0 };
        flight.routes = Some(routes);
        self.send(backend, queue, normed, &mut flight, &all);
        Ok(flight)
    }

    fn collect(
        &mut self,
        backend: &B,
        queue: &mut B::Queue,
        normed: &B::Activations,
        routes: &B::Routes,
        mut flight: InFlight<B>,
    ) -> Result<B::Activations, LoadFailed> {
        loop {
            if let Some(again) = self.compute(backend, queue, normed, routes, &mut flight)? {
                self.send(backend, queue, normed, &mut flight, &again);
                continue;
            }
            if flight.tickets.is_empty() {
                return Ok(flight.answers);
            }
            // Every ticket has its outcome: the link, or its teardown, sends one; and this end keeps a sender.
            let Ok(outcome) = self.outcomes.1.recv() else { return Ok(flight.answers) };
            if let Some(again) = self.take(backend, queue, &mut flight, outcome) {
                self.send(backend, queue, normed, &mut flight, &again);
            }
        }
    }
}

impl<B: Backend> InFlight<B> {
    fn new(layer: u32, answers: B::Activations) -> Self {
        let (here, tickets, tried) = (Here::default(), BTreeMap::new(), BTreeMap::new());
        Self { layer, answers, routes: None, here, tickets, tried }
    }
}

/// A slot has failed these experts in this layer.
fn give_up(tried: &mut BTreeMap<u32, Vec<Slot>>, slot: Slot, experts: impl Iterator<Item = u32>) {
    for expert in distinct(experts) {
        tried.entry(expert).or_default().push(slot);
    }
}

/// A peer, and whether it is to load what it lacks.
fn peer_of(target: Target) -> Option<(Slot, bool)> {
    match target {
        Target::Holder(slot) => Some((slot, false)),
        Target::Elected(slot) => Some((slot, true)),
        Target::Local => None,
    }
}

fn distinct(numbers: impl Iterator<Item = u32>) -> Vec<u32> {
    numbers.collect::<BTreeSet<_>>().into_iter().collect()
}

/// Rows that travel, in host memory.
struct Gathered<'a> {
    /// The rows' numbers in the step, ascending.
    rows: Vec<u32>,
    /// Their bits of bf16: (rows, hidden).
    values: &'a [u16],
    hidden: usize,
}

impl Gathered<'_> {
    /// The rows of a peer's pairs, each once with its experts. `pairs` ascend, so the experts of a row do.
    fn for_peer(&self, layer: u32, load: bool, routes: &Routes, pairs: &[u32]) -> Rows {
        let top_k = routes.top_k as u32;
        let mut rows = Rows { layer, load, ..Rows::default() };
        for chunk in pairs.chunk_by(|a, b| a / top_k == b / top_k) {
            let Ok(at) = self.rows.binary_search(&(chunk[0] / top_k)) else { continue };
            rows.row_experts.push(chunk.len() as u32);
            rows.experts.extend(chunk.iter().map(|&pair| routes.experts[pair as usize]));
            rows.values.extend_from_slice(&self.values[at * self.hidden..][..self.hidden]);
        }
        rows
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_travels_once_per_peer_with_its_experts() {
        let routes = Routes { top_k: 2, experts: vec![3, 9, 1, 9, 3, 4], weights: vec![0.5; 6] };
        let gathered = Gathered { rows: vec![0, 2], values: &[0, 0, 2, 2], hidden: 2 };
        let rows = gathered.for_peer(5, true, &routes, &[0, 1, 4]);
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
