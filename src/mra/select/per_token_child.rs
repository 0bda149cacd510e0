//! The blocks that each token of a range refines below the coarsest level: among the children of those that it refines above
//! (docs/definitions.md, section 5).

use std::ops::Range;

use super::child_candidates::{ChildCandidates, Listed};
use super::per_token::{Choice, PlanRow, descending};
use crate::exec::Buffer;
use crate::kernels::{Bounds, Largest, Matrix, MatrixMut, pack_transposed};
use crate::mra::problem::{Sight, TokenBudget};
use crate::simd::{Level, MOST_LANES, Scalar};

/// Queries whose largest logits are found together, each in a lane.
const LANES: usize = 64;

/// What the queries of a range choose from, and the buffers of a choice.
///
/// Queries go through the blocks above several times, each time in the order of [`Self::start`]: for logits ([`Self::list`]), where blocks
/// are ranked for scores ([`Self::list_candidates`]), and for the softmax; [`Self::restart`] comes between.
pub(crate) struct ChildChooser<T> {
    /// Blocks of this level in a block of the level above.
    children: usize,
    /// Blocks of this level.
    blocks: usize,
    /// The blocks that a query refines above, at most.
    most: usize,
    /// Those of each query, ascending, in rows of `most` places.
    parents: Vec<u32>,
    /// How many they are.
    counts: Vec<u32>,
    /// How many of them have been passed by [`Self::list`].
    passed: Vec<u32>,
    choices: Vec<Choice>,
    /// For each query a logit in a *slot* for each child of each of its places.
    logits: Buffer<T>,
    /// Whether scores decide in place of the logits, and those of the candidates.
    is_ranked: bool,
    candidates: ChildCandidates<T>,
    /// Logits or scores with a lane for each of some queries.
    columns: Buffer<T>,
    bounds: Buffer<T>,
    choosing: Vec<u32>,
    wanted: Vec<usize>,
    taken: Vec<usize>,
    rows: Vec<u32>,
    order: Vec<u32>,
}

impl<T: Scalar> ChildChooser<T> {
    pub(crate) fn new(children: usize) -> Self {
        Self {
            children,
            blocks: 0,
            most: 0,
            parents: Vec::new(),
            counts: Vec::new(),
            passed: Vec::new(),
            choices: Vec::new(),
            logits: Buffer::scratch(0),
            is_ranked: false,
            candidates: ChildCandidates::new(),
            columns: Buffer::scratch(0),
            bounds: Buffer::scratch(LANES),
            choosing: Vec::new(),
            wanted: Vec::new(),
            taken: Vec::new(),
            rows: Vec::new(),
            order: Vec::new(),
        }
    }

    /// Starts a range of queries. `lists` has the blocks that are refined above, ascending, and which queries refine each; there are
    /// `blocks` at this level. `finest` is what the queries see of the finest blocks, of which a block has `ratio` side by side.
    ///
    /// Returns whether some query has to choose.
    pub(crate) fn start<'l>(
        &mut self,
        budget: &TokenBudget,
        blocks: usize,
        (sights, finest, ratio): (&[Sight<'_>], &[Sight<'_>], usize),
        lists: impl Iterator<Item = (usize, &'l [u32])> + Clone,
    ) -> bool {
        self.blocks = blocks;
        self.is_ranked = false;
        for counts in [&mut self.counts, &mut self.passed] {
            counts.clear();
            counts.resize(sights.len(), 0);
        }
        for (_, queries) in lists.clone() {
            for &query in queries {
                self.counts[query as usize] += 1;
            }
        }
        self.most = self.counts.iter().copied().max().unwrap_or(0) as usize;
        self.parents.resize(sights.len() * self.most, 0);
        for (parent, queries) in lists {
            for &query in queries {
                let place = &mut self.passed[query as usize];
                self.parents[query as usize * self.most + *place as usize] =
                    u32::try_from(parent).expect("fewer than 2^32 blocks");
                *place += 1;
            }
        }
        self.passed.fill(0);
        self.choices.clear();
        for (query, (sight, finest)) in sights.iter().zip(finest).enumerate() {
            let forced = finest.forced(budget).at_level(ratio);
            let candidates = self.parents_of(query).iter().map(|&parent| self.children_of(parent));
            let choice = Choice::among(sight, &forced, budget, candidates);
            self.choices.push(choice);
        }
        self.choosing.clear();
        self.choosing.extend((0..).zip(&self.choices).filter(|(_, choice)| chooses(choice)).map(|(query, _)| query));
        let needed = if self.choosing.is_empty() { 0 } else { sights.len() * self.stride() };
        if self.logits.len() < needed {
            self.logits = Buffer::scratch(needed);
        }
        !self.choosing.is_empty()
    }

    /// Lists those of the queries that refine a block above which have to choose, and where the logits of its first child go. Blocks come
    /// in ascending order, each once.
    pub(crate) fn list(&mut self, queries: &[u32], listed: &mut Vec<(u32, usize)>) {
        listed.clear();
        let stride = self.stride();
        for &query in queries {
            let place = &mut self.passed[query as usize];
            if chooses(&self.choices[query as usize]) {
                listed.push((query, query as usize * stride + *place as usize * self.children));
            }
            *place += 1;
        }
    }

    /// Lists from the first block above again.
    pub(crate) fn restart(&mut self) {
        self.passed.fill(0);
    }

    /// Whether a query has to choose, and so has logits.
    pub(crate) fn has_logits(&self, query: u32) -> bool {
        chooses(&self.choices[query as usize])
    }

    /// The logits; once the queries have chosen they are `-inf` for all but the blocks that a query could have refined and does not.
    pub(crate) fn known_logits(&self) -> &[T] {
        &self.logits
    }

    /// Where logits go.
    pub(crate) fn logits(&mut self) -> &mut [T] {
        &mut self.logits
    }

    /// Calls `body` with the logits of the children of a block above, for each query that has to choose and each of its blocks.
    pub(crate) fn for_logits(&mut self, mut body: impl FnMut(usize, Range<usize>, &mut [T])) {
        let stride = self.stride();
        for &query in &self.choosing {
            let query = query as usize;
            let row = &mut self.logits[query * stride..];
            let parents = &self.parents[query * self.most..][..self.counts[query] as usize];
            for (&parent, logits) in parents.iter().zip(row.chunks_exact_mut(self.children)) {
                let blocks = children_of(parent, self.children, self.blocks);
                let count = blocks.len();
                body(query, blocks, &mut logits[..count]);
            }
        }
    }

    /// Finds the candidates of the queries, whose logits are there, `for_each` of them for each block that a query chooses: scores will
    /// decide.
    pub(crate) fn find_candidates(&mut self, level: Level, sights: &[Sight<'_>], for_each: usize) {
        self.is_ranked = true;
        self.candidates.clear(sights.len());
        let (choosing, stride) = (std::mem::take(&mut self.choosing), self.stride());
        for queries in choosing.chunks(LANES) {
            let slots = self.hide_each(queries, sights);
            let columns = self.want(level, queries, for_each);
            self.pack(level, queries, slots, columns);
            let numbers = Matrix::new(&self.columns, slots, columns, columns);
            T::run(level, Bounds { numbers, wanted: &self.wanted, bounds: &mut self.bounds });
            for (&query, &bound) in queries.iter().zip(&self.bounds[..]) {
                self.candidates.find(level, query as usize, &self.logits[query as usize * stride..][..slots], bound);
            }
        }
        self.choosing = choosing;
    }

    /// Lists those of the queries that refine a block above for which its children are candidates. Blocks come in ascending order, each
    /// once, from the first one after [`Self::restart`] on.
    pub(crate) fn list_candidates(&mut self, queries: &[u32], listed: &mut [Listed]) {
        for &query in queries {
            let place = &mut self.passed[query as usize];
            let first = *place as usize * self.children;
            self.candidates.list(query, first..first + self.children, listed);
            *place += 1;
        }
    }

    /// The scores of the candidates, where [`Self::list_candidates`] says; at first they are the logits.
    pub(crate) fn scores(&mut self) -> &mut [T] {
        self.candidates.scores()
    }

    /// Writes the plan of the range: for each query `width` numbers, the open blocks that it refines, ascending, then -1.
    pub(crate) fn choose(&mut self, level: Level, sights: &[Sight<'_>], plan: &mut [i32], width: usize) {
        let (choosing, slots) = (std::mem::take(&mut self.choosing), self.stride());
        for queries in choosing.chunks(LANES) {
            let stride = self.find_largest(level, queries, sights);
            for (lane, &query) in queries.iter().enumerate() {
                let (query, wanted) = (query as usize, self.wanted[lane]);
                if self.taken[lane] == wanted {
                    self.order.clear();
                    let rows = &self.rows[lane * stride..][..wanted];
                    if self.is_ranked {
                        let slots = self.candidates.slots_of(query);
                        self.order.extend(rows.iter().map(|&row| slots[row as usize]));
                    } else {
                        self.order.extend(rows);
                    }
                } else {
                    self.by_sorting(query, &sights[query], wanted);
                }
                self.write(query, &sights[query], &self.order, PlanRow::new(&mut plan[query * width..][..width]));
                let logits = &mut self.logits[query * slots..];
                self.order.iter().for_each(|&slot| logits[slot as usize] = T::NEG_INFINITY);
            }
        }
        self.choosing = choosing;
        for (query, sight) in sights.iter().enumerate().filter(|(query, _)| !chooses(&self.choices[*query])) {
            self.write(query, sight, &[], PlanRow::new(&mut plan[query * width..][..width]));
        }
    }

    /// Slots of a query, in whole vectors.
    fn stride(&self) -> usize {
        (self.most * self.children).next_multiple_of(MOST_LANES)
    }

    fn parents_of(&self, query: usize) -> &[u32] {
        &self.parents[query * self.most..][..self.counts[query] as usize]
    }

    fn children_of(&self, parent: u32) -> Range<usize> {
        children_of(parent, self.children, self.blocks)
    }

    /// Hides what some queries are not free to choose; returns how many slots they have, in whole vectors.
    fn hide_each(&mut self, queries: &[u32], sights: &[Sight<'_>]) -> usize {
        let parents = queries.iter().map(|&query| self.counts[query as usize]).max().unwrap_or(0);
        let slots = (parents as usize * self.children).next_multiple_of(MOST_LANES);
        for &query in queries {
            self.hide(query as usize, &sights[query as usize], slots);
        }
        slots
    }

    /// Sets those of the first `slots` logits of a query to `-inf` that are not of blocks which it is free to choose.
    fn hide(&mut self, query: usize, sight: &Sight<'_>, slots: usize) {
        let (stride, choice) = (self.stride(), &self.choices[query]);
        let row = &mut self.logits[query * stride..][..slots];
        let parents = &self.parents[query * self.most..][..self.counts[query] as usize];
        row[parents.len() * self.children..].fill(T::NEG_INFINITY);
        for (&parent, logits) in parents.iter().zip(row.chunks_exact_mut(self.children)) {
            let first = parent as usize * self.children;
            let blocks = first..first + self.children;
            let within = |range: &Range<usize>| range.start <= blocks.start && blocks.end <= range.end;
            if !sight.is_masked() && choice.ranges.iter().any(within) {
                continue;
            }
            for (logit, block) in logits.iter_mut().zip(blocks) {
                if !choice.contains(block) || !sight.is_open(block) {
                    *logit = T::NEG_INFINITY;
                }
            }
        }
    }

    /// Writes how many numbers each of some queries wants, `for_each` for each block that it chooses; returns how many lanes they take.
    fn want(&mut self, level: Level, queries: &[u32], for_each: usize) -> usize {
        let columns = queries.len().next_multiple_of(T::lanes(level));
        self.wanted.clear();
        self.wanted.extend(queries.iter().map(|&query| self.choices[query as usize].take.saturating_mul(for_each)));
        self.wanted.resize(columns, 0);
        columns
    }

    /// Brings the logits of some queries into lanes.
    fn pack(&mut self, level: Level, queries: &[u32], slots: usize, columns: usize) {
        if self.columns.len() < slots * columns {
            self.columns = Buffer::scratch(slots * columns);
        }
        let stride = self.stride();
        let rows = queries.iter().map(|&query| &self.logits[query as usize * stride..][..slots]);
        let mut packed = MatrixMut::new(&mut self.columns, slots, columns, columns);
        pack_transposed(level, rows, T::from_f64(1.0), &mut packed);
    }

    /// Finds the largest numbers of some queries, among candidates or slots; returns the room for those of each.
    fn find_largest(&mut self, level: Level, queries: &[u32], sights: &[Sight<'_>]) -> usize {
        let columns = self.want(level, queries, 1);
        let height = if self.is_ranked {
            self.candidates.pack(queries, columns, &mut self.columns)
        } else {
            let slots = self.hide_each(queries, sights);
            self.pack(level, queries, slots, columns);
            slots
        };
        self.taken.clear();
        self.taken.resize(columns, 0);
        let stride = self.wanted.iter().copied().max().unwrap_or(0);
        self.rows.resize(self.rows.len().max(columns * stride), 0);
        let numbers = Matrix::new(&self.columns, height, columns, columns);
        T::run(level, Largest { numbers, wanted: &self.wanted, rows: &mut self.rows, stride, taken: &mut self.taken });
        stride
    }

    /// The same choice by partial sorting: slower, but for any number of blocks, and with NaN in their place, which is the last.
    /// Leaves slots in `order`.
    fn by_sorting(&mut self, query: usize, sight: &Sight<'_>, wanted: usize) {
        let choice = &self.choices[query];
        self.order.clear();
        let places = self.parents[query * self.most..][..self.counts[query] as usize].iter().enumerate();
        for (place, &parent) in places {
            let blocks = children_of(parent, self.children, self.blocks);
            let free = blocks.clone().filter(|&block| choice.contains(block) && sight.is_open(block));
            let slot =
                |block: usize| u32::try_from(place * self.children + block - blocks.start).expect("fewer than 2^32 slots");
            self.order.extend(free.map(slot));
        }
        let logits = &self.logits[query * self.stride()..];
        let score = |slot: u32| {
            if !self.is_ranked {
                return logits[slot as usize];
            }
            let found = self.candidates.slots_of(query).binary_search(&slot);
            found.map_or(T::NEG_INFINITY, |place| self.candidates.scores_of(query)[place])
        };
        self.order.select_nth_unstable_by(wanted - 1, |&a, &b| descending(score(a), score(b)).then(a.cmp(&b)));
        self.order.truncate(wanted);
        self.order.sort_unstable();
    }

    /// Writes the open blocks that are forced, and those in the `chosen` slots, which are ascending.
    fn write(&self, query: usize, sight: &Sight<'_>, chosen: &[u32], mut row: PlanRow<'_>) {
        let choice = &self.choices[query];
        let [before, behind] = &choice.ranges;
        let all = choice.take == choice.free;
        let mut chosen = chosen.iter().map(|&slot| slot as usize).peekable();
        for (place, &parent) in self.parents_of(query).iter().enumerate() {
            let (blocks, slot) = (self.children_of(parent), place * self.children);
            let is_free = |range: &Range<usize>| range.start <= blocks.start && blocks.end <= range.end;
            if !all && (is_free(before) || is_free(behind)) {
                while let Some(found) = chosen.next_if(|&found| found < slot + blocks.len()) {
                    row.push(blocks.start + found - slot);
                }
                continue;
            }
            let mut next = blocks.start;
            for range in [before, behind, &(blocks.end..blocks.end)] {
                let start = range.start.clamp(next, blocks.end);
                let end = range.end.clamp(start, blocks.end);
                (next..start).filter(|&block| sight.is_open(block)).for_each(|block| row.push(block));
                if all {
                    (start..end).filter(|&block| sight.is_open(block)).for_each(|block| row.push(block));
                } else {
                    while let Some(found) = chosen.next_if(|&found| found < slot + end - blocks.start) {
                        row.push(blocks.start + found - slot);
                    }
                }
                next = end;
            }
        }
        row.finish();
    }
}

/// Whether logits decide.
fn chooses(choice: &Choice) -> bool {
    choice.take > 0 && choice.take < choice.free
}

fn children_of(parent: u32, children: usize, blocks: usize) -> Range<usize> {
    let first = parent as usize * children;
    first..(first + children).min(blocks)
}
