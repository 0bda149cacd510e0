//! One sequence of queries and keys: its tokens, its blocks, its form, and what its tokens see.

use std::ops::Range;
use std::sync::Arc;

use super::alibi::Alibi;
use super::block_bias::BlockBias;
use super::blocks::{Blocks, to_i64};
use super::options::Options;
use super::padding::Padding;
use super::sight::{Sight, Window};
use super::token_kinds::TokenKinds;

/// How a sequence is computed (docs/definitions.md, section 2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    /// Queries are averaged, and a head shares a budget: where nothing is hidden but padding.
    Block,
    /// Every token chooses for itself.
    Token,
}

/// A sequence. Blocks, numbers and positions are its own; tokens are those of the tensors.
#[derive(Debug, Clone)]
pub(crate) struct Segment {
    /// Its place among all sequences of the call.
    pub(crate) index: usize,
    /// The batch item in which it lies.
    pub(crate) batch: usize,
    pub(crate) form: Form,
    /// The queries that are averaged.
    pub(crate) queries: Blocks,
    /// The queries that are computed, in the same blocks; the outputs of all others are 0.
    pub(crate) rows: Blocks,
    pub(crate) keys: Blocks,
    /// Which blocks of queries have a valid one, unless all with a computed one do.
    live: Option<Vec<bool>>,
    /// How many blocks have a valid query.
    live_rows: usize,
    /// Blocks of padded queries in front of the first valid one.
    lead: usize,
    /// The position of the first query, counted from the first valid key.
    first_position: i64,
    /// A query at which work is cut, so that padding in front of it moves no boundary.
    anchor: usize,
    /// Mean biases; block form.
    pub(crate) bias: Option<Arc<BlockBias>>,
    /// Mean distances, if there is a bias by distance.
    pub(crate) alibi: Option<Arc<Alibi>>,
    /// What a mask hides; token form.
    pub(crate) kinds: Option<Arc<TokenKinds>>,
}

/// The tokens of a sequence in the tensors, and the position of its first query among its keys.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    pub(crate) index: usize,
    pub(crate) batch: usize,
    pub(crate) queries: Range<usize>,
    pub(crate) keys: Range<usize>,
    pub(crate) offset: i64,
}

impl Place {
    /// Whether this is not the first place, and nothing tells its tokens from those of the first one: a bias is the same for all batch
    /// items and no other mask is given.
    pub(crate) fn is_like_first(&self, places: &[Self], options: &Options<'_>) -> bool {
        let first = &places[0];
        self.index != first.index
            && options.key_mask.is_none()
            && options.query_mask.is_none()
            && options.bias.is_some_and(|bias| bias.is_same_for_items())
            && (&self.queries, &self.keys, self.offset) == (&first.queries, &first.keys, first.offset)
    }
}

impl Segment {
    /// With blocks of `size` tokens; in this form if a level above has it. `found` is what the bias says of tokens, if there is one.
    pub(crate) fn new(place: &Place, options: &Options<'_>, found: Option<&Padding>, size: usize, form: Option<Form>) -> Self {
        let (item, threads) = (place.batch, options.threads);
        let unmasked_key = |key: usize| options.key_mask.is_none_or(|mask| mask.is_valid(item, key));
        let unmasked_query = |query: usize| options.query_mask.is_none_or(|mask| mask.is_valid(item, query));
        let is_key = |key: usize| unmasked_key(key) && found.is_none_or(|found| found.seen_keys[key]);
        let sees = |query: usize| unmasked_query(query) && found.is_none_or(|found| !found.blind_queries[query]);
        let (any_key_hidden, any_query_hidden) =
            (options.key_mask.is_some() || found.is_some(), options.query_mask.is_some() || found.is_some());
        let blocks = |tokens: &Range<usize>, hidden: bool, counts: &dyn Fn(usize) -> bool| {
            // A look at every token would take longer than a step of decoding.
            if hidden { Blocks::from_first(tokens.clone(), size, counts) } else { Blocks::all(tokens.clone(), size) }
        };
        let keys = blocks(&place.keys, any_key_hidden, &is_key);
        let padded_queries =
            options.query_mask.is_some() || (any_query_hidden && place.queries.clone().any(|query| !sees(query)));
        let first_key = usize::try_from(keys.origin()).expect("blocks of keys begin at a key") - place.keys.start;
        let implied = !padded_queries && keys.total() < place.keys.len() && place.queries.len() == place.keys.len();
        let anchor = if implied {
            place.queries.start + first_key
        } else {
            place.queries.clone().find(|&query| sees(query)).unwrap_or(place.queries.start)
        };
        let hides = !options.window.is_unlimited()
            || !options.pool_queries
            || form == Some(Form::Token)
            || found.is_some_and(|found| !found.is_all);
        let is_biased = found.is_some_and(|found| found.is_biased);
        let mut segment = Self {
            index: place.index,
            batch: item,
            form: Form::Token,
            queries: Blocks::all(0..0, size),
            rows: blocks(&place.queries, any_query_hidden, &sees),
            keys,
            live: None,
            live_rows: 0,
            lead: 0,
            first_position: place.offset.saturating_sub(to_i64(first_key)),
            anchor,
            bias: None,
            alibi: None,
            kinds: None,
        };
        if !hides {
            segment.pool_queries(place, size, implied.then_some(&is_key));
            let additive = options.bias.as_ref().filter(|_| is_biased);
            segment.bias = additive
                .and_then(|bias| BlockBias::new(bias, item, &segment.queries, &segment.keys, threads, options.level))
                .map(Arc::new);
            segment.form = if segment.bias.is_some() == additive.is_some() { Form::Block } else { Form::Token };
        }
        if segment.form == Form::Token {
            segment.rows = blocks(&place.queries, any_query_hidden, &sees);
            (segment.live, segment.lead) = (None, 0);
            // A mask that is padding has done its part; empty blocks are dead.
            let bias = options.bias.as_ref().filter(|_| is_biased || found.is_some_and(|found| !found.is_all));
            if bias.is_some() || segment.keys.any_empty() {
                let sight = |token| segment.window_sight(&options.window, token, size);
                let kinds = TokenKinds::new(bias, is_biased, item, place.queries.clone(), &segment.keys, threads, sight);
                segment.kinds = Some(Arc::new(kinds));
            }
        }
        if options.alibi_slopes.is_some() {
            segment.alibi = Some(Arc::new(Alibi::new(&segment.queries, &segment.keys, |query| segment.position(query))));
        }
        segment.live_rows = if implied && segment.form == Form::Token {
            // Padded queries have no share in the budget, and the valid ones are those of the keys.
            (0..segment.keys.len()).filter(|&j| segment.keys.count(j) > 0).count()
        } else if segment.form == Form::Token {
            (0..segment.rows.len()).filter(|&i| segment.rows.count(i) > 0).count()
        } else {
            (0..segment.rows.len()).filter(|&i| segment.is_live(i)).count()
        };
        segment
    }

    /// The queries of the block form. `implied` says which keys are valid where that is taken for the queries as well.
    fn pool_queries(&mut self, place: &Place, size: usize, implied: Option<&impl Fn(usize) -> bool>) {
        let Some(is_key) = implied else {
            self.queries = self.rows.clone();
            return;
        };
        let tokens = place.queries.clone();
        let is_valid = |query: usize| is_key(query - place.queries.start + place.keys.start);
        self.rows = Blocks::around(tokens.clone(), size, self.anchor, |_| true);
        let live: Vec<bool> = (0..self.rows.len()).map(|i| self.rows.range(i).any(is_valid)).collect();
        self.lead = (self.anchor - tokens.start).div_ceil(size);
        let block_of = |query: usize| (self.lead * size + query - self.anchor) / size;
        self.queries =
            Blocks::around(tokens, size, self.anchor, |query| is_valid(query) || !live[block_of(query).min(live.len() - 1)]);
        self.live = Some(live);
    }

    /// The same in another batch item.
    pub(crate) fn at(&self, place: &Place) -> Self {
        Self { index: place.index, batch: place.batch, ..self.clone() }
    }

    /// Whether a block of queries has a valid one.
    pub(crate) fn is_live(&self, i: usize) -> bool {
        self.live.as_ref().map_or_else(|| self.queries.count(i) > 0, |live| live[i])
    }

    /// How many blocks of queries have a valid one.
    pub(crate) fn live_rows(&self) -> usize {
        self.live_rows
    }

    /// Blocks of padded queries in front of the first valid one.
    pub(crate) fn lead(&self) -> usize {
        self.lead
    }

    /// The place of a block of queries, counted from the first valid one.
    pub(crate) fn row_position(&self, i: usize) -> i64 {
        to_i64(i) - to_i64(self.lead)
    }

    /// The position of a query, counted from the first valid key.
    pub(crate) fn position(&self, token: usize) -> i64 {
        self.first_position.saturating_add(to_i64(token - self.rows.tokens().start))
    }

    fn window_sight<'s>(&self, window: &Window, token: usize, size: usize) -> Sight<'s> {
        Sight::new(window, self.position(token), &self.keys, size)
    }

    /// What a query of a head sees.
    pub(crate) fn sight(&self, window: &Window, head: usize, token: usize, size: usize) -> Sight<'_> {
        if !self.rows.counts(token) {
            return Sight::default();
        }
        let sight = self.window_sight(window, token, size);
        match &self.kinds {
            None => sight,
            Some(kinds) => {
                let (kinds, alive) = kinds.of(head, token - self.rows.tokens().start);
                sight.with_kinds(kinds, alive)
            }
        }
    }

    /// Whether biases are added to its logits.
    pub(crate) fn is_biased(&self) -> bool {
        self.bias.is_some() || self.kinds.as_ref().is_some_and(|kinds| kinds.is_biased())
    }

    /// The blocks of queries in tiles of at most `size`, which padding in front does not shift.
    pub(crate) fn row_tiles(&self, size: usize) -> impl Iterator<Item = Range<usize>> + use<> {
        let cut = |range: Range<usize>| {
            let end = range.end;
            range.step_by(size).map(move |start| start..(start + size).min(end))
        };
        cut(0..self.lead).chain(cut(self.lead..self.rows.len()))
    }

    /// The mean biases of the blocks of keys for a query of a head, if there is a bias.
    pub(crate) fn mean_biases(&self, head: usize, token: usize) -> Option<&[f64]> {
        self.kinds.as_ref().and_then(|kinds| kinds.means_of(head, token - self.rows.tokens().start))
    }

    /// Cuts all queries into ranges of at most `size`, at the anchor and at multiples of `size` from there.
    pub(crate) fn ranges(&self, size: usize) -> impl Iterator<Item = Range<usize>> + use<> {
        let Range { start, end } = self.rows.tokens();
        let first = size - (self.anchor - start).next_multiple_of(size).abs_diff(self.anchor - start);
        let mut next = start;
        std::iter::from_fn(move || {
            (next < end).then(|| {
                let length = if next == start { first } else { size };
                let range = next..(next + length).min(end);
                next = range.end;
                range
            })
        })
    }

    /// Which of `turns` one of these ranges has: they come round and round from the anchor on, so padding in front of it changes none.
    pub(crate) fn turn_of_range(&self, range: &Range<usize>, size: usize, turns: usize) -> usize {
        let place = (to_i64(range.start) - to_i64(self.anchor)).div_euclid(to_i64(size));
        usize::try_from(place.rem_euclid(to_i64(turns))).expect("less than the turns")
    }

    /// Cuts queries at positions that are multiples of `size`. So a piece of as many queries as a block has, or fewer, lies in one
    /// block if the sizes divide each other.
    pub(crate) fn tiles(&self, tokens: Range<usize>, size: usize) -> impl Iterator<Item = Range<usize>> {
        let mut start = tokens.start;
        std::iter::from_fn(move || {
            (start < tokens.end).then(|| {
                let into = usize::try_from(self.position(start).rem_euclid(to_i64(size))).expect("less than the size");
                let piece = start..(start + size - into).min(tokens.end);
                start = piece.end;
                piece
            })
        })
    }
}
