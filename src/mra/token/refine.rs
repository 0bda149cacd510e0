//! A level below the coarsest: which children of the blocks that the queries of a range refine above are refined in turn, and the softmax
//! over the others (docs/definitions.md, section 5).
//!
//! ```text
//! for each block that is refined above, ascending, for the queries that refine it:
//!     c_tj = scale <q_t, kh_j>        for each of its children j
//! plan_t = forced ones, and those with the largest c_tj, or the largest score of a few with the largest c_tj (rank); cut ones are
//!          refined without it
//! for each block again:  state_t continues over the children that t sees all of and does not refine, + ln count_j
//! ```

use std::ops::Range;

use super::coarse::{CoarseSource, State, matrix};
use super::key_block::{KeyBlock, Keys, RangeOfHead};
use super::key_codes::CANDIDATES;
use super::queries_of_block::QueriesOfBlocks;
use super::rank::{QueryCodes, RankedBlocks, Scorer};
use crate::kernels::{AllFinite, Matrix, Softcap, Stream, Visible};
use crate::mra::problem::{Problem, Score, Segment, Sight};
use crate::mra::select::{ChildChooser, Listed, child_columns};
use crate::simd::{Element, Scalar};

/// The queries of a range at a level, and what they refine above.
#[derive(Clone, Copy)]
pub(crate) struct Refining<'a> {
    pub(crate) sights: &'a [Sight<'a>],
    /// What they see of the finest blocks.
    pub(crate) finest: &'a [Sight<'a>],
    /// Which of them refine which blocks above.
    pub(crate) lists: &'a QueriesOfBlocks,
}

/// The buffers of a level.
pub(crate) struct Refiner<T> {
    children: usize,
    tile: KeyBlock<T>,
    chooser: ChildChooser<T>,
    /// Where blocks are ranked by more than logits, and the queries that have each child of a block as a candidate.
    scorer: Option<Scorer<T>>,
    candidates: Vec<Listed>,
    /// Whether the chooser has the logits of this range.
    chosen: bool,
    listed: Vec<(u32, usize)>,
    left: Vec<u32>,
    known: Vec<u32>,
    places: Vec<usize>,
    weights: Vec<T>,
    names: Vec<u32>,
}

impl<T: Scalar> Refiner<T> {
    /// Buffers for a level below another one, whose blocks have so many members at most.
    pub(crate) fn new(problem: &Problem<'_>, members: usize) -> Self {
        let children = problem.children().expect("a level below another one");
        Self {
            children,
            tile: KeyBlock::new(problem, children, true),
            chooser: ChildChooser::new(children),
            scorer: (problem.score == Score::Max).then(|| Scorer::new(problem, members)),
            candidates: vec![Listed::default(); children],
            chosen: false,
            listed: Vec::new(),
            left: Vec::new(),
            known: Vec::new(),
            places: Vec::new(),
            weights: Vec::new(),
            names: Vec::new(),
        }
    }

    /// Chooses the blocks that the queries refine, unless the plan is given. `plan` has `width` numbers for each of them; `ranked` is
    /// what blocks are ranked by, if not by their means.
    pub(crate) fn choose<E: Element<Compute = T>>(
        &mut self,
        source: &CoarseSource<'_, T>,
        range: &RangeOfHead<'_, T>,
        ranked: Option<(&RankedBlocks<'_, E>, &QueryCodes<T>)>,
        Refining { sights, finest, lists }: Refining<'_>,
        plan: &mut [i32],
        width: usize,
    ) {
        self.chosen = false;
        let (Some(budget), Some(keys)) = (&source.budget, &source.keys) else { return };
        let (problem, segment) = (source.problem, source.segment);
        if width == 0 {
            return;
        }
        self.chosen = true;
        let parents = lists.present().iter().enumerate().map(|(place, &parent)| (parent, lists.all_of(place)));
        let queries = (sights, finest, problem.ratio);
        if self.chooser.start(budget, segment.keys.len(), queries, parents.clone()) {
            for (parent, queries) in parents {
                self.chooser.list(queries, &mut self.listed);
                if !self.listed.is_empty() {
                    let means = matrix(keys, child_columns(segment, parent, self.children));
                    self.tile.pack(&means, range.queries);
                    self.tile.multiply(range.queries, means.rows, &self.listed, self.chooser.logits());
                }
            }
            self.chooser.for_logits(|query, blocks, logits| {
                if let Some(cap) = problem.softcap.map(T::from_f64) {
                    T::run(problem.level, Softcap { logits, cap, slopes: None });
                }
                add_mean_biases(problem, segment, source.head, range.tokens.start + query, &blocks, logits);
            });
            if let Some((ranked, queries)) = ranked {
                self.chooser.find_candidates(problem.level, sights, CANDIDATES);
                self.score(source, (ranked, queries), lists);
            }
        }
        self.chooser.choose(problem.level, sights, plan, width);
    }

    /// Scores the candidates, block by block.
    fn score<E: Element<Compute = T>>(
        &mut self,
        source: &CoarseSource<'_, T>,
        (ranked, queries): (&RankedBlocks<'_, E>, &QueryCodes<T>),
        lists: &QueriesOfBlocks,
    ) {
        let scorer = self.scorer.as_mut().expect("blocks are ranked");
        self.chooser.restart();
        for (place, &parent) in lists.present().iter().enumerate() {
            self.chooser.list_candidates(lists.all_of(place), &mut self.candidates);
            for (block, listed) in child_columns(source.segment, parent, self.children).zip(&mut self.candidates) {
                if listed.queries.is_empty() {
                    continue;
                }
                let scores = self.chooser.scores();
                scorer.score(source.problem, (ranked, block), (queries, 0), &listed.queries, |index, beyond| {
                    scores[listed.places[index]] += beyond;
                });
                listed.queries.clear();
                listed.places.clear();
            }
        }
    }

    /// Continues the softmax of the queries over the blocks that they do not refine.
    pub(crate) fn attend(
        &mut self,
        source: &CoarseSource<'_, T>,
        range: &RangeOfHead<'_, T>,
        Refining { sights, lists, .. }: Refining<'_>,
        plan: &[i32],
        width: usize,
        state: &mut State<T>,
    ) {
        let (Some(keys), Some(values)) = (&source.keys, &source.values) else { return };
        let (problem, segment) = (source.problem, source.segment);
        let row = |query: usize| &plan[query * width..][..width];
        // Those that queries have chosen by have their biases in them, to which what a block counts would be added in another order.
        let reuse = self.chosen && problem.softcap.is_none() && !segment.is_biased() && segment.alibi.is_none();
        self.chooser.restart();
        for (place, &parent) in lists.present().iter().enumerate() {
            let blocks = child_columns(segment, parent, self.children);
            let finite = T::run(problem.level, AllFinite(matrix(values, blocks.clone())));
            self.split(lists.all_of(place), reuse, finite, |t| leaves_some(&sights[t as usize], row(t as usize), &blocks));
            if self.left.is_empty() && self.known.is_empty() {
                continue;
            }
            weights_of(problem, segment, &blocks, &mut self.weights);
            self.names.clear();
            self.names.extend(blocks.clone().filter(|_| problem.dropout.is_some()).map(block_name));
            let (keys, values) = (matrix(keys, blocks.clone()), matrix(values, blocks.clone()));
            let at = Keys { keys, values, stream: Stream::Coarse, names: &self.names, ahead: None };
            let read = |query: usize, biases: &mut [T]| {
                let token = range.tokens.start + query;
                let of_blocks = (&blocks, &self.weights[..]);
                read_row(problem, segment, (source.head, token), &sights[query], row(query), of_blocks, biases);
            };
            // What they do not see or refine is -inf in their logits already.
            let visible = Visible::Biased(Matrix::repeated(&self.weights, self.known.len()));
            let given = Some((self.chooser.known_logits(), &self.places[..]));
            self.tile.attend(range, &at, &self.known, visible, given, state);
            if self.left.is_empty() {
                continue;
            }
            self.tile.pack(&keys, range.queries);
            if finite {
                self.tile.attend_biased(range, &at, &self.left, None, read, state);
            } else {
                self.tile.attend_one_by_one(range, &at, &self.left, read, state);
            }
        }
    }

    /// Splits the queries of the next block above that leave some of its children: those whose logits are known, if these are
    /// to be used, and all others.
    fn split(&mut self, queries: &[u32], reuse: bool, finite: bool, leaves: impl Fn(u32) -> bool) {
        self.listed.clear();
        if reuse {
            self.chooser.list(queries, &mut self.listed);
        }
        self.known.clear();
        self.places.clear();
        for &(query, place) in self.listed.iter().filter(|&&(query, _)| finite && leaves(query)) {
            self.known.push(query);
            self.places.push(place);
        }
        self.left.clear();
        let is_known = |query: u32| reuse && finite && self.chooser.has_logits(query);
        self.left.extend(queries.iter().copied().filter(|&query| !is_known(query) && leaves(query)));
    }
}

/// What dropout calls a block: the low 32 bits of its number.
pub(crate) fn block_name(block: usize) -> u32 {
    #[allow(clippy::cast_possible_truncation, reason = "the low 32 bits count")]
    {
        block as u32
    }
}

/// Which numbers of an ascending row of a plan are among some blocks.
fn refined<'p>(row: &'p [i32], blocks: &Range<usize>) -> &'p [i32] {
    // What fills the row, -1, is behind every block here.
    let place = |block: usize| row.partition_point(|&number| usize::try_from(number).is_ok_and(|number| number < block));
    &row[place(blocks.start)..place(blocks.end)]
}

/// Whether a query sees all of a block among these that it does not refine.
pub(crate) fn leaves_some(sight: &Sight<'_>, row: &[i32], blocks: &Range<usize>) -> bool {
    sight.count_open_of(blocks) > refined(row, blocks).len()
}

/// Writes what is added to the logits of some blocks because of what each counts.
pub(crate) fn weights_of<T: Scalar>(problem: &Problem<'_>, segment: &Segment, blocks: &Range<usize>, to: &mut Vec<T>) {
    let weight = |count: usize| T::from_f64((count as f64).ln() + problem.coarse_shift);
    to.clear();
    match segment.keys.count_of_each(blocks.clone()) {
        Some(count) => to.resize(blocks.len(), weight(count)),
        None => to.extend(blocks.clone().map(|block| weight(segment.keys.count(block)))),
    }
}

/// Writes what is added to the logits of a query of a head on some blocks: their weights ([`weights_of`]) and the mean bias, or `-inf`
/// where it does not see all of the block or refines it by its `row` of the plan.
pub(crate) fn read_row<T: Scalar>(
    problem: &Problem<'_>,
    segment: &Segment,
    (head, token): (usize, usize),
    sight: &Sight<'_>,
    row: &[i32],
    (blocks, weights): (&Range<usize>, &[T]),
    biases: &mut [T],
) {
    biases.copy_from_slice(weights);
    add_mean_biases(problem, segment, head, token, blocks, biases);
    if sight.is_masked() || sight.count_open_of(blocks) < blocks.len() {
        for (bias, _) in biases.iter_mut().zip(blocks.clone()).filter(|&(_, block)| !sight.is_open(block)) {
            *bias = T::NEG_INFINITY;
        }
    }
    for &number in refined(row, blocks) {
        let block = usize::try_from(number).expect("a block of the plan");
        biases[block - blocks.start] = T::NEG_INFINITY;
    }
}

/// Adds the mean biases of a query of a head on some blocks.
fn add_mean_biases<T: Scalar>(
    problem: &Problem<'_>,
    segment: &Segment,
    head: usize,
    token: usize,
    blocks: &Range<usize>,
    to: &mut [T],
) {
    if let Some(means) = segment.mean_biases(head, token) {
        to.iter_mut().zip(&means[blocks.clone()]).for_each(|(to, &mean)| *to += T::from_f64(mean));
    }
    if let (Some(alibi), Some(slope)) = (&segment.alibi, problem.alibi_slope(segment.batch, head)) {
        let position = segment.position(token);
        for (to, block) in to.iter_mut().zip(blocks.clone()) {
            *to += T::from_f64(-slope * alibi.mean_distance(position, &segment.keys, block));
        }
    }
}
