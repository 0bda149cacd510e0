//! Which queries of a range have which blocks among their exact ones.

use crate::mra::problem::Sight;

/// For each block of keys the queries of a range that compute it exactly, in two lists, each ascending: those that see it partly, or
/// that lie in it, and those that see all of it.
#[derive(Debug, Default)]
pub(crate) struct QueriesOfBlocks {
    /// The blocks that have a query, ascending: few of many where there are few queries, as when decoding.
    present: Vec<usize>,
    /// Where the first list of each of them starts, and the second one; then where the last one ends.
    starts: Vec<[u32; 2]>,
    queries: Vec<u32>,
    /// Of a counting sort: where each list goes on.
    next: Vec<u32>,
    /// Of a sort of few entries: list and query.
    entries: Vec<(usize, u32)>,
}

impl QueriesOfBlocks {
    /// Sorts the plan of a range by blocks. `plan` has `width` numbers for each query, of which those that
    /// are no block of which it sees all keys, or the same one again, are left out; every block if `width` is 0.
    pub(crate) fn build(&mut self, blocks: usize, sights: &[Sight<'_>], plan: &[i32], width: usize) {
        self.present.clear();
        self.starts.clear();
        self.queries.clear();
        if sights.len().saturating_mul(width.max(1)) < blocks {
            self.sort_few(sights, plan, width);
        } else {
            self.count(2 * blocks, sights, plan, width);
        }
        let end = to_u32(self.queries.len());
        self.starts.push([end, end]);
    }

    fn sort_few(&mut self, sights: &[Sight<'_>], plan: &[i32], width: usize) {
        self.entries.clear();
        for_entries(sights, plan, width, |query, list| self.entries.push((list, query)));
        self.entries.sort_unstable();
        for lists in self.entries.chunk_by(|a, b| a.0 / 2 == b.0 / 2) {
            let start = self.queries.len();
            let partly = lists.iter().take_while(|(list, _)| list % 2 == 0).count();
            self.queries.extend(lists.iter().map(|&(_, query)| query));
            self.present.push(lists[0].0 / 2);
            self.starts.push([to_u32(start), to_u32(start + partly)]);
        }
    }

    /// A counting sort.
    fn count(&mut self, lists: usize, sights: &[Sight<'_>], plan: &[i32], width: usize) {
        self.next.clear();
        self.next.resize(lists + 1, 0);
        for_entries(sights, plan, width, |_, list| self.next[list + 1] += 1);
        for block in 0..lists / 2 {
            let [start, middle] = [self.next[2 * block], self.next[2 * block] + self.next[2 * block + 1]];
            let end = middle + self.next[2 * block + 2];
            (self.next[2 * block + 1], self.next[2 * block + 2]) = (middle, end);
            if end > start {
                self.present.push(block);
                self.starts.push([start, middle]);
            }
        }
        self.queries.resize(self.next[lists] as usize, 0);
        for_entries(sights, plan, width, |query, list| {
            let place = &mut self.next[list];
            self.queries[*place as usize] = query;
            *place += 1;
        });
    }

    /// The blocks that some query has among its exact ones, ascending.
    pub(crate) fn present(&self) -> &[usize] {
        &self.present
    }

    /// The place of a block among those present.
    pub(crate) fn find(&self, block: usize) -> Option<usize> {
        self.present.binary_search(&block).ok()
    }

    /// The queries behind the `done` first ones of a block, by its place: the rest of them, then those of the blocks that follow.
    pub(crate) fn behind(&self, place: usize, done: usize) -> &[u32] {
        &self.queries[self.starts[place][0] as usize + done..]
    }

    /// The queries of a block, by its place, counted from the start of the range: those that may not see all of it, then those that do.
    pub(crate) fn of(&self, place: usize) -> [&[u32]; 2] {
        let [start, middle] = self.starts[place].map(|start| start as usize);
        [&self.queries[start..middle], &self.queries[middle..self.starts[place + 1][0] as usize]]
    }

    /// All queries of a block, by its place.
    pub(crate) fn all_of(&self, place: usize) -> &[u32] {
        &self.queries[self.starts[place][0] as usize..self.starts[place + 1][0] as usize]
    }
}

fn to_u32(count: usize) -> u32 {
    u32::try_from(count).expect("fewer than 2^32 entries of a range")
}

/// Calls `body(query, list)` for every exact block of each query: list `2 * block` if the query may not see all of it.
fn for_entries(sights: &[Sight<'_>], plan: &[i32], width: usize, mut body: impl FnMut(u32, usize)) {
    for (query, sight) in (0..).zip(sights) {
        let list = |block: usize| 2 * block + usize::from(!sight.is_own(block));
        sight.for_cut(|block| body(query, 2 * block));
        if width == 0 {
            let open = sight.live.clone().filter(|&block| sight.is_open(block));
            open.for_each(|block| body(query, list(block)));
            continue;
        }
        let row = &plan[query as usize * width..][..width];
        // Plans are ascending as a rule, and then one comparison tells that a number was not there before.
        let mut largest = -1;
        for (place, &number) in row.iter().enumerate() {
            if number < 0 || (number <= largest && row[..place].contains(&number)) {
                continue;
            }
            largest = largest.max(number);
            if let Some(block) = open_block(number, sight) {
                body(query, list(block));
            }
        }
    }
}

/// The block that a number of a plan stands for, if the query sees all of it.
pub(crate) fn open_block(number: i32, sight: &Sight<'_>) -> Option<usize> {
    usize::try_from(number).ok().filter(|&block| sight.is_open(block))
}
