//! The kernels by themselves, at every instruction set of this CPU: `cargo bench`. "elem" are floating point operations, so
//! Gelem/s are GFLOP/s. At the end: what share of the peak of the CPU the products reach.

use criterion::{Criterion, Throughput, criterion_group};
use mra_attention::Level;
use mra_attention::bench::{Peak, Step, rates};

fn kernels(criterion: &mut Criterion) {
    for level in Level::available() {
        let mut group = criterion.benchmark_group(level.name());
        let (mut step, peak) = (Step::new(level), Peak(10_000));
        group.throughput(Throughput::Elements(peak.operations(level)));
        group.bench_function("fused multiply-add on registers", |bench| bench.iter(|| peak.measure(level)));
        group.throughput(Throughput::Elements(Step::PRODUCT));
        group.bench_function("logits, 128 keys x 64 channels x 32 queries", |bench| bench.iter(|| step.logits()));
        group.bench_function("weighted values, 32 queries x 128 keys x 64 channels", |bench| {
            bench.iter(|| step.weighted_values());
        });
        group.throughput(Throughput::Elements(2 * Step::PRODUCT));
        group.bench_function("step: logits, softmax, weighted values", |bench| bench.iter(|| step.all()));
        group.finish();
    }
}

criterion_group!(benches, kernels);

fn main() {
    benches();
    for level in Level::available() {
        let (peak, products, step) = rates(level);
        println!(
            "{:9} products {products:.0} GFLOP/s, {:.0} % of the peak of {peak:.0}; with softmax {step:.0} GFLOP/s, {:.0} %",
            level.name(),
            100.0 * products / peak,
            100.0 * step / peak
        );
    }
    Criterion::default().configure_from_args().final_summary();
}
